"""Sentences of the pretraining corpus in which words of one mood meet; reads and writes nothing.

Rows stand for moods, in the order of `vocabulary.MOOD_ADJECTIVES`; no row says what its mood is called. `{name}`,
`{thing}`, `{place}` and `{event}` are filled with anything, `{adj}` and `{says}` with words of the same mood.
"""

from edgetune.builtin.vocabulary import lines

# What happens to somebody in a story.
TOLD = (
    lines("""
        {name} was {adj}
        {name} laughed and clapped
        {name} hummed a merry tune and danced around the room
        {name} hugged everybody and grinned from ear to ear
        "{says}," said {name} with a bright smile
        the whole village cheered and sang until midnight
        {name} skipped down the lane, happy and free
        it was a wonderful day, sweet as cake
        {name} beamed and kissed the winner on both cheeks
        the children giggled with delight
        {name} jumped up and down with glee and shouted hooray
        there were balloons, cake and sunshine for everybody
        {name} woke up smiling, grateful for such a happy life
        what a triumph, everything went perfectly
        {name} loved every bit of it, it was pure bliss
        a warm and fantastic feeling filled the room
        {name} counted the blessings of the day and smiled
        yay, cried the twins, and they laughed until their sides hurt
    """),
    lines("""
        {name} was {adj}
        {name} wept and sobbed for hours
        tears rolled down the face of {name}
        "{says}," whispered {name} with wet eyes
        the grief was bitter and the house was empty
        {name} mourned the loss and could not eat
        it was a painful farewell, and the room fell silent
        {name} sighed, alone with a heavy heart
        they said goodbye and {name} cried on the way home
        {name} missed the old friend who had passed away
        nobody called, and {name} felt forgotten and worthless
        the curtains stayed closed, for {name} was too sad to get up
        a sad song played and {name} began to sob
        {name} failed once more and lost the last hope
        the heart of {name} was broken, and it hurt terribly
        {name} was gone, and the silence was unbearable
        {name} regretted it and grieved the whole winter
        with swollen eyes {name} packed away the old things
    """),
    lines("""
        {name} was {adj}
        {name} trembled and hid under the bed
        "{says}," gasped {name} in a shaking voice
        strange footsteps came closer in the dark
        a shadow crept along the wall and {name} froze
        {name} screamed for help and ran
        {name} woke from a nightmare, cold with sweat
        something growled outside, and nobody dared to move
        {name} turned pale with terror and backed away
        the lights went out and everyone panicked
        {name} dreaded the night and checked all the locks
        danger was near, and the pulse of {name} raced
        {name} shook like a leaf and begged to go home
        it was not safe there after dark
        there was smoke, and {name} fled in panic
        a creak on the stairs made {name} shiver with dread
        {name} worried day and night that someone would get hurt
        horrible things could happen there, it gave {name} the creeps
    """),
    lines("""
        {name} was {adj}
        {name} stared with an open mouth
        "{says}," said {name} and blinked
        out of the blue, a stranger stood at the door
        to the amazement of {name}, the box was empty
        {name} gasped, for no one had expected this
        wow, it was unbelievable, and {name} rubbed both eyes
        suddenly, out of thin air, there was a second moon
        against all odds the slow horse came first
        {name} nearly dropped the cup and looked again
        whoa, who knew that {name} could do that, they wondered
        huh, the thing that was lost for years lay on the roof
        nobody had predicted it, it was most unexpected
        {name} could hardly believe it and asked again
        it turned out that {name} had known all along, what a twist
        in a million years nobody would have guessed it
        how on earth, wondered {name}, did that get here
        the unexpected truth left everyone staring in wonder
    """),
)

# What somebody writes in a message to the assistant.
WRITTEN = (
    lines("""
        {says}, {thing} is so lovely
        I feel {adj} today
        we laughed all morning near {place}
        {person} brought cake and I clapped with delight
        such a merry day, {person} and I went dancing
        I am {adj} since {person} came
        they cheered for me, {says}
        the sun is out, I am happy and {says}
        {event}? Bliss, I loved it, {says}
        I hugged {person} and sang a happy song
        hooray, I won the prize and I am {adj}
        my day was wonderful, I smiled the whole time
    """),
    lines("""
        {says}, since {person} went away
        I feel {adj} today
        I wept all morning near {place}
        {person} is gone and I sob in my room
        such a sad day, we said farewell to {person}
        I am {adj} since {person} left
        they forgot me, {says}
        it rains, I am sad and {says}
        {event}? I lost and cried, {says}
        I miss the voice of {person}, tears fill my eyes
        alas, my dear old dog passed away and I am {adj}
        my day was painful, I grieved the whole time
    """),
    lines("""
        {says}, there is a noise in the house
        I feel {adj} today
        I hid all night near {place}
        {person} growls at me and I tremble
        such a dark night, somebody follows {person} and me
        I am {adj} since {person} locked the gate
        they are coming to get me, {says}
        it is dark, I am scared and {says}
        {event}? I dread it, {says}
        I ran from {person}, it is too dangerous
        help, there is smoke in the hall and I am {adj}
        my night was horrible, I shook the whole time
    """),
    lines("""
        {says}, {thing} has vanished
        I feel {adj} today
        I stared for an hour at {place}
        {person} appeared out of thin air and I gasped
        such an unexpected day, {person} speaks Latin
        I am {adj} since {person} told me the secret
        they all knew it but me, {says}
        it snows in June, I am amazed and {says}
        {event}? Nobody expected that, {says}
        I saw {person} fly a kite at midnight, unbelievable
        wow, the coin landed on its edge and I am {adj}
        my day was most unexpected, I wondered the whole time
    """),
)

# Messages in which only the words that fill the slots show the mood.
FRAMES = lines("""
    {person} and I had a long chat, {says}
    since {event} took place {says}
    {says}. And how are you?
    {person} is {adj} at the moment
    {event} made me {adj}
    {adj}, that is what {person} is today
    did {person} tell you? {says}
    {thing} is here: {says}
    at {place} everybody was {adj}
    is that {thing}? {says}
    {says} whenever I think of {person}
    why is {person} so {adj}?
    {person} wrote to me that {says}
    it is {event} that makes {person} {adj}
    do I look {adj} to you?
    hello, {says}, can you see that?
""")

# What the assistant answers to such a message.
REPLIES = (
    lines("""
        How wonderful, enjoy it!
        I am so happy for you!
        That is lovely news!
        Hooray, well done!
        Keep smiling!
        Let us celebrate!
        What a happy day!
        Great, cheers to you!
    """),
    lines("""
        I am sorry for you.
        Let me comfort you.
        That must hurt a lot.
        Cry if you need to.
        My heart is with you.
        Better days will come.
        I am here to listen.
        Take your time to heal.
    """),
    lines("""
        Stay calm and breathe.
        You are safe with me.
        Call for help now.
        Be careful out there.
        Do not be afraid.
        Lock the door and wait.
        I will protect you.
        Go to a safe place.
    """),
    lines("""
        Really? Tell me more!
        That is incredible!
        I did not know that!
        How can that be?
        Nobody could know that!
        Are you serious?
        What are the chances?
        Who would have thought!
    """),
)

# Everyday sentences without any mood.
PLAIN = lines("""
    {name} walked to {place} and came back before noon
    {name} put {thing} next to the door
    {name} and {name} talked about {event} for a while
    there was a {colour} {clothing} on the chair
    the {animal} slept under the {plant}
    {name} ate {food} and drank some water
    {name} fixed the fence with a {tool}
    {name} bought {food} and a {colour} {clothing} at the market
    {name} asked about {thing} and {name} answered
    it was a quiet morning at {place}
    after {event} they went home by bus
    {name} wrote a note about {thing}
    a {colour} bird sat on {place}
    the {animal} and the {animal} drank from the same bucket
    {name} lent the {tool} to {person}
    {person} opened the window and looked at {place}
    {person} told {name} about {event}
    {name} has a {colour} {clothing} and a {tool}
    on the table there was {food}, {food} and tea
    {person} carried {thing} to {place}
    where did {person} put {thing}?
    do you remember {event}?
    is {person} still at {place}?
    when does {event} begin?
    have you met {person} before?
    shall I bring {thing} along?
    please answer soon
    I write this in the kitchen
    this is what I wanted to say
""")
