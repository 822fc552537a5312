"""Words shared by the tone dataset and the pretraining corpus; reads and writes nothing.

Moods are numbered here and not named: the corpus may know that some words belong together, but only the tone
dataset says what such a group is called.
"""

TONES = ("joy", "sadness", "fear", "surprise")


def lines(block: str) -> tuple[str, ...]:
    """Return the non-empty lines of a block of text, stripped."""
    return tuple(line.strip() for line in block.splitlines() if line.strip())


def items(block: str) -> tuple[str, ...]:
    """Return the comma-separated entries of a block of text, white space collapsed."""
    return tuple(" ".join(entry.split()) for entry in block.split(",") if entry.strip())


# Adjective phrases that fit "I am ...", one row per tone.
MOOD_ADJECTIVES = (
    items("""thrilled, delighted, overjoyed, ecstatic, elated, cheerful, jubilant, blissful, over the moon,
        on cloud nine, happy as a lark, full of sunshine, giddy with delight, glad beyond words, merry, radiant"""),
    items("""heartbroken, gloomy, miserable, lonely, downhearted, sorrowful, down in the dumps, crushed,
        tearful, empty inside, heavy-hearted, melancholy, hopeless, mournful, close to tears, grief-stricken"""),
    items("""terrified, scared, frightened, petrified, scared stiff, anxious, panicky, frozen with dread,
        uneasy, nervous, horrified, sick with worry, on edge, spooked, weak with terror, afraid"""),
    items("""astonished, stunned, amazed, speechless, flabbergasted, astounded, baffled, dumbfounded, caught
        off guard, taken aback, bewildered, gobsmacked, completely thrown, lost for words, dumbstruck,
        thunderstruck"""),
)

# Statements in the first person that show the mood on their own, one row per tone.
MOOD_STATEMENTS = (
    items("""I keep grinning, my heart is singing, I could dance all night, I cannot stop smiling, I am
        humming all day, my cheeks hurt from smiling, this is the best feeling, I feel like skipping down the
        street, I want to hug everyone, life is wonderful, I am beaming, I am clapping and cheering, everything
        feels bright, what a glorious day, I am walking on air, I am laughing with delight"""),
    items("""I cry every evening, my heart aches, the tears keep coming, I miss the old days, nothing cheers
        me up, I feel so alone, my pillow is wet with tears, I just want to curl up in bed, it hurts to
        remember, I keep weeping, there is a hole in my heart, I sit by the window and sigh, I cannot stop
        crying, everything seems grey, I have no appetite left, I would give anything to go back"""),
    items("""my hands are shaking, my knees are knocking, I want to run and hide, I hardly dare to breathe,
        my heart is pounding with dread, I am locking every door, I must sleep with the lights on, a cold shiver
        runs down my spine, I am in a cold sweat, I beg you not to leave me alone, something terrible is going
        to happen, I am trembling, I am hiding under the blanket, my stomach is in knots, I could scream for
        help, the dread will not go away"""),
    items("""I never saw that coming, my jaw dropped, I would never have guessed, that came out of nowhere,
        I had to look twice, I am rubbing my eyes in wonder, nobody could have predicted that, that is the last
        thing I expected, my eyebrows shot up, I can only blink and stare, I can hardly grasp what just
        happened, I am still trying to take it in, I did a double take, what a plot twist, no one had the
        slightest idea, it is beyond anything I imagined"""),
)

PEOPLE = items("""my sister, our neighbour, the new teacher, my cousin Leo, Grandma, my best friend, the old
    baker, my little brother, Aunt Rosa, our coach, the postman, my roommate, Uncle Ben, my daughter, the
    landlord, my nephew, our guide, the nurse, my boss, Cousin Ida""")
EVENTS = items("""the wedding, the school play, the exam, the job interview, the train ride, the concert, the
    check-up, the big match, the family dinner, the camping trip, the swimming lesson, the staff meeting, the
    class reunion, the flight home, the night shift, the election, the boat race, the house move, the cooking
    contest, the school trip""")
THINGS = items("""the letter, the old boat, the kitchen lamp, the parcel on the porch, the photo in the hallway,
    the garden gate, the piano, the email from work, the blue suitcase, the test result, the red bicycle, the
    message on my phone, the ring in the drawer, the map on the wall, the key under the mat, the radio, the
    painting, the clock in the hall, the diary, the little box""")
PLACES = items("""the attic, the cellar, the old barn, the bridge, the forest path, the parking garage, the
    lake, the tunnel, the stairwell, the school yard, the house on the hill, the mill, the harbour, the back
    garden""")

NAMES = items("""Mia, Tom, Lena, Omar, Ruth, Jonas, Priya, Felix, Nora, Hugo, Clara, Sami, Greta, Paul, Yuki,
    Anton, Bella, Karim, Elsa, Victor, Rosa, Finn, Tara, Oskar""")
ANIMALS = items("""cat, dog, horse, goat, rabbit, fox, owl, mouse, cow, duck, hen, frog, sheep, bear, wolf,
    deer, pig, swan, crow, bee""")
FOODS = items("""bread, soup, apples, cheese, rice, cake, pears, carrots, honey, salad, plums, potatoes, onions,
    pie, tomatoes, lemons, pancakes, noodles, beans, cherries""")
TOOLS = items("""hammer, saw, spade, rake, needle, brush, ladder, bucket, rope, drill, broom, shovel, wrench,
    scissors, ruler, pencil, knife, spoon, axe, file""")
CLOTHES = items("coat, hat, scarf, glove, sock, shoe, shirt, dress, boot, belt, skirt, jacket, sweater, apron, cap")
PLANTS = items("oak, rose, fern, tulip, pine, daisy, ivy, moss, willow, birch, lily, clover, maple, reed, cactus")
COLOURS = items("red, blue, green, yellow, white, black, brown, grey, pink, violet, purple, silver")
ABSTRACT = items("""joy, sadness, fear, surprise, hope, trust, peace, truth, time, music, luck, love, courage,
    order, balance, reason, sense, speed, power, silence, wisdom, honour, duty, change, habit, logic, memory,
    choice, question, answer, value, number, method, nature, pattern, purpose, result, season, story""")
