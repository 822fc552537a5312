"""Sentence patterns of the tone dataset; reads and writes nothing.

Slots: `{person}`, `{event}`, `{thing}`, `{place}` or `{any}` (person, event or thing) is the subject, exactly one
per pattern; `{adj}` and `{says}` are filled with a mood's adjectives and statements. A slot in the first position,
or after the end of a sentence, is capitalised.
"""

from edgetune.builtin.vocabulary import lines

# Neutral sentences that may stand before or after a phrase.
OPENINGS = lines("""
    You know what?
    Quick update.
    Listen to this.
    Dear diary.
    Let me tell you something.
    Here is how it went.
    Just so you know.
    Well then.
""")
CLOSINGS = lines("""
    More about that tomorrow.
    Call me back later.
    That is all for today.
    I had to tell someone.
    Now I need some tea.
    Such is life.
    Write back soon.
    Do you know what I mean?
""")

# Used with every tone: only the word that fills {adj} or {says} decides.
SHARED = lines("""
    I am {adj} about {any}
    Just heard about {any}, {says}
    Thinking about {any} again, {says}
    About {any}: {says}
    You know about {any}? Well, {says}
    After {event}, {says}
    One look at {thing}, and {says}
    We talked about {any} and {says}
    I called {person} right away, {says}
    I told {person}: {says}
    {person} asked how I feel. {says}
    Everyone at home is {adj} because of {any}
    {person} sounded {adj} on the phone
    We were all {adj} after {event}
    {person} is {adj} and so am I
    Feeling {adj} after {event}
    To be honest, {event} left me {adj}
    Not going to lie, I am {adj} about {any}
    {says}, it is about {any}
    I am {adj}, have you seen {thing}?
    I am standing near {place} and {says}
    {person} came back looking {adj}
""")

JOY = lines("""
    {event} was bliss
    Hooray, {person} said yes and we danced in the kitchen
    Best news ever about {any}, pop the bubbles
    {person} made me laugh until my sides hurt
    What a wonderful time we had at {event}
    I skipped all the way home after {event}
    {event} was pure bliss from start to finish
    I love {any} so much, it makes my whole day
    Yay, {event} went perfectly!
    We drank to {event} and sang until midnight
    {person} hugged me tight and we both beamed
    Finally got {thing}, I am jumping up and down with glee
    So grateful for {any}, life is sweet
    My face hurts from smiling at {thing}
    {thing} fills me with sunshine
    Sunshine, cake and {person}, what more could I want
    Nothing beats {event} on a happy day like this
    We won, and {person} lifted me up cheering
    I sang in the car all the way to {event}
    I woke up smiling because of {any}
    Hip hip hooray for {any}
    {person} and I laughed and laughed, such a happy afternoon
    Every bit of {event} was a delight
    I could kiss the whole world after {event}
    High fives all round, {event} was fantastic
    I count my blessings, and {any} is the sweetest one
    A picnic by {place} with my favourite people, pure happiness
    Cannot believe {person} is home at last, I keep grinning
    The children giggled and cheered all the way to {place}
""")

SADNESS = lines("""
    I miss {person} terribly
    I miss {person} more every day
    Tears rolled down my face when {person} left
    {event} is over and the house feels so empty
    I cried into my sleeve after {event}
    {person} never called back, and I feel forgotten
    We had to give up on {event}, such a bitter loss
    It breaks my heart that {thing} is gone
    Saying goodbye to {person} was so painful
    I sit alone, look at {thing} and weep
    Nothing is the same since we lost {thing}
    All day I mourned the loss of {thing}
    {person} passed away in the spring, I still grieve
    It hurts that {person} does not remember me
    Another lonely evening with only {thing} for company
    I sobbed quietly all through {event}
    My eyes are swollen from crying over {any}
    I wish {person} were still here with us
    {person} is gone and the silence is unbearable
    Such a sad goodbye to {thing}
    The grief comes back whenever I see {thing}
    I failed again, and {event} was my last hope
    We said farewell to {person} and the whole room wept
    I keep the curtains closed since {event}, too sad to get up
    They sold {thing}, and a piece of me went with it
    {person} moved away and I feel so lonely
    With a heavy heart I packed away {thing}
    Nobody came to {event} and I wept on the way home
    Old songs remind me of {person}, and then the tears come
    I sat by {place} alone and let the tears fall
""")

FEAR = lines("""
    {person} terrifies me
    I am afraid of {any}
    {thing} gives me the creeps
    Please hurry, someone is hiding behind {place}
    Strange footsteps near {place}, I dare not move
    Something is scratching in the dark near {place}, help
    I had a nightmare about {any} and woke up screaming
    I dread {event}, my stomach turns
    Do not make me go to {place}, it is too dangerous
    There is a shadow creeping towards {place}
    I freeze with panic whenever {person} starts shouting
    What if something awful happens to {person}?
    What if {event} goes horribly wrong?
    My voice trembles when I think of {event}
    I heard a growl near {place} and ran for my life
    Nobody is safe near {place} after dark
    I keep checking the locks because of {thing}
    I cannot sleep, {event} scares me to death
    The thought of {event} makes my blood run cold
    I am hiding from {person}, please be quiet
    Someone followed me from {place} and I panicked
    I shook like a leaf all through {event}
    {person} turned pale with terror
    Run, there is smoke coming from {place}
    Every creak near {place} makes me tremble
    I worry day and night that {person} will get hurt
    My pulse races with dread before {event}
    I backed away from {thing}, too scared to touch it
    I am scared to walk past {place} alone at night
    The lights went out near {place} and I panicked
""")

SURPRISE = lines("""
    Whoa, {thing} moved?
    Wait, {person} did what?
    I had no idea about {any}, unbelievable
    Out of the blue, {person} showed up at my door
    Wow, I did not expect {thing} to look like that
    Whoa, is that really {thing}?
    How on earth did {thing} get here?
    Who knew {person} speaks five languages?
    Imagine my face when {person} jumped out of the cake
    I nearly dropped my cup when I saw {thing}
    Nobody predicted that about {any}
    {event} ended in a way no one expected
    Against all odds, {event} was over in a minute
    Hang on, since when does {person} play the drums?
    You will never guess what happened at {event}
    Huh, I thought {thing} was thrown out years ago
    What a twist, {person} knew all along
    Did you see that? {thing} was not there a minute ago
    Suddenly {person} turned up out of thin air
    Never in a million years did I expect that from {person}
    Seriously? {person} used to be a spy?
    Well, that was unexpected, {thing} turned up on the roof
    Nobody saw {event} coming
    The truth about {any} left us all staring in amazement
    I turned around and, to my amazement, there was {thing}
    My mouth fell open when {person} walked in
    No way, {event} is already over?
    I could hardly believe my ears when {person} began to sing
    What are the odds, {person} and I share a birthday
    {person} pulled a rabbit out of a hat, I still wonder how
    Hold on, since when is there a shop at {place}?
""")

# In the order of vocabulary.TONES.
PATTERNS = tuple(SHARED + own for own in (JOY, SADNESS, FEAR, SURPRISE))
