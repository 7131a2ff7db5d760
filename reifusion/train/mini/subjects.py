"""The subjects that the mini can draw, and their names.

`CHOSEN` lists the emoji that become subjects, with the names that people use for them. The other lists hold
the exceptions: names that take no "a", and subjects that must not be mirrored or dyed.
"""

from __future__ import annotations

import re

import numpy as np

# The emoji that become subjects, by Unicode subgroup. "*" takes the whole subgroup, "-label" leaves one out,
# "label" takes one, and "label = name, synonym, …" takes one under the names that a person would ask for.
CHOSEN = {
    "face-smiling": """grinning face = happy face; grinning squinting face = laughing face; face with tears of
        joy = face with tears of joy, laughing crying face; slightly smiling face = smiling face, smiley;
        upside-down face; melting face; winking face; smiling face with smiling eyes = blushing face;
        smiling face with halo = face with halo""",
    "face-affection": """smiling face with hearts = face with hearts; smiling face with heart-eyes = face with
        heart eyes, face in love; star-struck = face with star eyes; face blowing a kiss; kissing face with
        closed eyes = kissing face""",
    "face-tongue": """face with tongue = face with tongue out; zany face = crazy face; money-mouth face =
        money face""",
    "face-hand": "smiling face with open hands = hugging face; shushing face; thinking face; saluting face",
    "face-neutral-skeptical": """zipper-mouth face; neutral face; face with rolling eyes; lying face = face
        with long nose""",
    "face-sleepy": "sleeping face",
    "face-unwell": """*; -sneezing face; -woozy face; face with medical mask = face with mask; face with
        head-bandage = face with bandage; nauseated face = sick face; face vomiting = vomiting face; face
        with crossed-out eyes = dead face; face with spiral eyes = dizzy face; cold face = freezing face""",
    "face-hat": """*; cowboy hat face = cowboy face; partying face = party face; disguised face = face in
        disguise""",
    "face-glasses": "*; smiling face with sunglasses = face with sunglasses, cool face",
    "face-concerned": """confused face; frowning face = sad face; face with open mouth = surprised face;
        pleading face; fearful face = scared face; crying face; loudly crying face = sobbing face; face
        screaming in fear = screaming face; yawning face""",
    "face-negative": """angry face; enraged face = furious face; face with symbols on mouth = swearing face;
        smiling face with horns = smiling devil; angry face with horns = angry devil; skull; skull and
        crossbones""",
    "face-costume": """*; -goblin; -ogre; pile of poo = poop; clown face = clown; alien monster = space
        invader""",
    "cat-face": """grinning cat = happy cat face; smiling cat with heart-eyes = cat face with heart eyes;
        crying cat = crying cat face; pouting cat = angry cat face""",
    "monkey-face": """see-no-evil monkey = monkey covering its eyes; hear-no-evil monkey = monkey covering its
        ears; speak-no-evil monkey = monkey covering its mouth""",
    "heart": """love letter; heart with arrow; heart with ribbon; sparkling heart; broken heart; heart on fire
        = burning heart; red heart = heart; two hearts; black heart; white heart""",
    "emotion": """kiss mark = lips, kiss; collision = explosion, bang; speech balloon = speech bubble; thought
        balloon = thought bubble""",
    "hand-fingers-open": "waving hand; raised hand = hand",
    "hand-fingers-partial": """OK hand; victory hand = peace sign; crossed fingers; sign of the horns = rock
        hand sign""",
    "hand-single-finger": "backhand index pointing up = hand pointing up",
    "hand-fingers-closed": "thumbs up; thumbs down; raised fist = fist",
    "hands": "clapping hands; heart hands; handshake; folded hands = praying hands",
    "hand-prop": "nail polish",
    "body-parts": """flexed biceps = strong arm, muscle; mechanical arm = robot arm; leg; foot; ear; nose;
        brain; anatomical heart = human heart; lungs; tooth; bone; eyes; eye; tongue""",
    "person": """baby; boy; girl; man; woman; old man = old man, grandfather; old woman = old woman,
        grandmother""",
    "person-role": """health worker = doctor, nurse; student; teacher; judge; farmer; cook = chef; mechanic;
        scientist; singer; artist = painter; pilot; astronaut; firefighter; police officer; detective; guard
        = royal guard; ninja; construction worker = builder; prince; princess; person with crown = king""",
    "person-fantasy": """baby angel = angel; Santa Claus = santa; superhero; mage = wizard; fairy; vampire;
        mermaid; elf; genie; zombie; troll""",
    "person-activity": "woman dancing = dancer",
    "person-sport": """person surfing = surfer; snowboarder; skier; person biking = cyclist; person swimming =
        swimmer""",
    "person-resting": "person in lotus position = person meditating",
    "animal-mammal": """*; -badger; -bison; -guide dog; -ox; -pig nose; -ram; -rat; -service dog; -two-hump
        camel; -water buffalo; ewe = sheep; rabbit = rabbit, bunny; hippopotamus = hippo; rhinoceros =
        rhino; boar = wild boar; chipmunk = squirrel""",
    "animal-bird": """*; -dodo; -front-facing baby chick; -phoenix; -wing; baby chick = chick; black bird =
        crow; chicken = hen""",
    "animal-amphibian": "frog",
    "animal-reptile": "*; sauropod = brontosaurus, dinosaur; T-Rex = t-rex, dinosaur, tyrannosaurus",
    "animal-marine": "*; -orca; -oyster; blowfish = pufferfish; spiral shell = seashell, shell",
    "animal-bug": """*; -cockroach; -microbe; bug = caterpillar; honeybee = bee; lady beetle = ladybug; spider
        web = spider web, cobweb""",
    "plant-flower": """*; -hyacinth; -rosette; -white flower; blossom = flower; wilted flower = wilted rose;
        lotus = lotus flower; bouquet = bouquet, bunch of flowers""",
    "plant-other": """*; -empty nest; -herb; -leafless tree; evergreen tree = pine tree; deciduous tree =
        tree; seedling = sprout; sheaf of rice = rice plant; four leaf clover = four-leaf clover; fallen
        leaf = autumn leaf; leaf fluttering in wind = leaf""",
    "food-fruit": "*; -lime; tangerine = orange; red apple = apple; kiwi fruit = kiwi",
    "food-vegetable": """*; -brown mushroom; -chestnut; -ginger root; -root vegetable; ear of corn = corn; hot
        pepper = chili pepper; leafy green = lettuce; pea pod = peas""",
    "food-prepared": """*; -falafel; -flatbread; -fondue; -tamale; baguette bread = baguette; cheese wedge =
        cheese; poultry leg = chicken leg; cut of meat = steak; hamburger = hamburger, burger; french fries
        = french fries, fries; stuffed flatbread = kebab, gyro; cooking = fried egg; shallow pan of food =
        paella; pot of food = stew; bowl with spoon = bowl of soup; green salad = salad; salt = salt shaker;
        canned food = tin can; pizza = pizza, slice of pizza""",
    "food-asian": """*; -dango; -fish cake with swirl; -fortune cookie; -moon cake; -oden; -rice cracker;
        -roasted sweet potato; -takeout box; cooked rice = bowl of rice; curry rice = curry; steaming bowl =
        bowl of noodles, ramen""",
    "food-sweet": """*; soft ice cream = ice cream cone; doughnut = donut; shortcake = slice of cake, piece of
        cake; custard = pudding; honey pot = jar of honey; birthday cake = birthday cake, cake""",
    "drink": """*; -clinking beer mugs; -mate; -pouring liquid; -sake; hot beverage = cup of coffee, coffee;
        teacup without handle = cup of tea; bottle with popping cork = champagne bottle; wine glass = glass
        of wine; cocktail glass = cocktail, martini; beer mug = beer, glass of beer; clinking glasses =
        champagne glasses; tumbler glass = glass of whiskey; cup with straw = soda, cup with a straw;
        beverage box = juice box; ice = ice cube""",
    "dishware": "*; -fork and knife with plate; amphora = vase; kitchen knife = knife",
    "place-map": "globe showing Americas = earth, planet earth, globe; world map = world map, map; compass",
    "place-geographic": """*; -landslide; -national park; snow-capped mountain = snowy mountain; camping =
        campsite; beach with umbrella = beach; desert island = tropical island, island""",
    "place-building": """stadium; classical building = greek temple; building construction = construction
        crane, crane; brick = brick wall, bricks; rock = rock, stone; wood = log; hut; house; house with
        garden; hospital; bank; hotel; office building = office building, skyscraper; school; factory;
        castle; Tokyo tower = tower; Statue of Liberty""",
    "place-religious": "*; -kaaba; shinto shrine = torii gate",
    "place-other": """fountain; tent; night with stars = city at night; cityscape = city; sunrise over
        mountains; sunrise; sunset; bridge at night = bridge; carousel horse; playground slide = slide;
        ferris wheel; roller coaster; circus tent""",
    "transport-ground": """locomotive = steam train, steam locomotive; bullet train; train; tram; bus;
        minibus; ambulance; fire engine = fire truck; police car; taxi; automobile = car; sport utility
        vehicle = suv; pickup truck; delivery truck = truck; articulated lorry = semi truck, lorry; tractor;
        racing car = race car; motorcycle; motor scooter = scooter, moped; manual wheelchair = wheelchair;
        auto rickshaw; bicycle = bicycle, bike; kick scooter; skateboard; roller skate; motorway = highway,
        road; railway track; oil drum = barrel; fuel pump = gas pump; wheel; police car light = siren;
        vertical traffic light = traffic light; stop sign; construction = road barrier""",
    "transport-water": """*; -ferry; -motor boat; ring buoy = life preserver; passenger ship = cruise ship;
        sailboat = sailboat, sailing boat""",
    "transport-air": """airplane = airplane, plane; small airplane; parachute; helicopter; mountain cableway =
        cable car; satellite; rocket = rocket, spaceship; flying saucer = ufo, alien spaceship""",
    "hotel": "luggage = suitcase",
    "time": "hourglass not done = hourglass; watch = watch, wristwatch; alarm clock; stopwatch",
    "sky-weather": """full moon = moon; crescent moon; full moon face = moon with a face; sun; sun with face =
        sun with a face; ringed planet = planet with a ring, saturn; star; glowing star; shooting star;
        milky way = galaxy; cloud; sun behind cloud = sun behind a cloud; cloud with lightning and rain =
        storm cloud, thunderstorm; cloud with rain = rain cloud; cloud with snow = snow cloud; tornado;
        cyclone = spiral; rainbow; umbrella; high voltage = lightning bolt, lightning; snowflake; snowman
        without snow = snowman; comet; fire = fire, flame; droplet = water drop; water wave = wave;
        thermometer""",
    "event": """jack-o-lantern = jack-o'-lantern, carved pumpkin; Christmas tree; fireworks; sparkles;
        balloon; party popper = party popper, confetti; ribbon = bow, ribbon bow; wrapped gift = gift,
        present; admission tickets = tickets""",
    "award-medal": """trophy; sports medal = medal; 1st place medal = gold medal, first place medal; 2nd place
        medal = silver medal; 3rd place medal = bronze medal""",
    "sport": """*; -cricket game; -curling stone; -field hockey; -flag in hole; -lacrosse; -rugby football;
        -softball; american football = football; tennis = tennis racket; flying disc = frisbee; bowling =
        bowling ball and pins; ice hockey = hockey stick; ping pong = ping pong paddle; badminton =
        badminton racket; martial arts uniform = karate uniform; fishing pole = fishing rod; running shirt =
        tank top; goal net = soccer goal""",
    "game": """*; -club suit; -diamond suit; -flower playing cards; -heart suit; -joker; -mahjong red dragon;
        -spade suit; -water pistol; bullseye = target, bullseye; pool 8 ball = eight ball, billiard ball;
        game die = dice; piñata = pinata; mirror ball = disco ball; video game = game controller; nesting
        dolls = nesting doll""",
    "arts-crafts": """*; -knot; -sewing needle; -thread; performing arts = theater masks; artist palette =
        paint palette; yarn = ball of yarn; framed picture = picture frame, painting""",
    "clothing": """*; -briefs; -clutch bag; -flat shoe; -goggles; -hair pick; -hiking boot; -lab coat;
        -military helmet; -prayer beads; -rescue worker’s helmet; -safety vest; -sari; -woman’s clothes;
        folding hand fan = fan; one-piece swimsuit = swimsuit; thong sandal = flip-flop; man’s shoe = shoe;
        running shoe = sneaker; woman’s sandal = sandal; woman’s boot = boot; woman’s hat = sun hat; billed
        cap = cap, baseball cap; gem stone = gem, jewel; high-heeled shoe = high heel; purse = purse,
        wallet; t-shirt = t-shirt, shirt; necktie = necktie, tie; jeans = jeans, pants; ring = ring, diamond
        ring""",
    "sound": "speaker high volume = speaker; megaphone; bell",
    "music": "musical note; musical notes; microphone; headphone = headphones; radio",
    "musical-instrument": "*; -harp; -long drum; -trombone; musical keyboard = piano",
    "phone": "mobile phone = phone, smartphone; telephone",
    "computer": """battery; electric plug; laptop; desktop computer = desktop computer, computer; printer;
        keyboard; computer mouse; floppy disk; optical disk = cd; abacus""",
    "light-video": """movie camera; television = television, tv; camera; magnifying glass tilted left =
        magnifying glass; candle; light bulb; flashlight; red paper lantern = paper lantern""",
    "book-paper": """closed book = book; open book; books = stack of books, books; notebook; scroll; page
        facing up = sheet of paper; newspaper""",
    "money": "coin; money bag = money bag, bag of money; dollar banknote = dollar bill; credit card",
    "mail": """envelope = envelope, letter; package = box, cardboard box; closed mailbox with raised flag =
        mailbox""",
    "writing": "*; -black nib; -fountain pen; memo = paper and pencil",
    "office": """briefcase; calendar; pushpin; paperclip; straight ruler = ruler; scissors; wastebasket =
        trash can""",
    "lock": "locked = padlock, lock; unlocked = open padlock; key; old key",
    "tool": """*; -broken chain; -clamp; -hammer and pick; -hammer and wrench; -hook; -link; -nut and bolt;
        -shovel; -white cane; pick = pickaxe; crossed swords = crossed swords, swords; carpentry saw = saw;
        balance scale = scale; gear = gear, cog""",
    "science": "*; -petri dish; alembic = flask; satellite antenna = satellite dish",
    "medical": "*; -crutch; drop of blood = blood drop; adhesive bandage = bandage",
    "household": """*; -elevator; -mouse trap; -plunger; -razor; -safety pin; couch and lamp = sofa, couch;
        roll of paper = toilet paper; lotion bottle = shampoo bottle""",
    "other-object": "coffin; headstone = gravestone",
    "warning": "warning = warning sign; radioactive = radioactive sign",
    "punctuation": "red question mark = question mark; red exclamation mark = exclamation mark",
    "other-symbol": "trident emblem = trident; check mark; cross mark = cross",
    "geometric": """red circle = circle; red square = square; red triangle pointed up = triangle; large orange
        diamond = diamond""",
}


def _list(text: str) -> frozenset[str]:
    return frozenset(" ".join(text.split()).split("; "))


# A label is also a synonym, unless it names a colour or is one of these, which nobody uses for the thing.
ODD_LABELS = _list("""backhand index pointing up; leaf fluttering in wind; cooking; salt; steaming
    bowl; ice; headphone; shallow pan of food; hot beverage; globe showing americas; camping; building
    construction; brick; night with stars; construction; hourglass not done; high voltage; snowman
    without snow; tennis; bowling; ping pong; badminton; ice hockey; performing arts; magnifying glass
    tilted left; speaker high volume; page facing up; closed mailbox with raised flag; locked; unlocked;
    warning; radioactive; cyclone; desert island; pick; custard; cross mark; running shirt; memo; sun
    behind cloud; nesting dolls; dollar banknote; star-struck""")
COLOUR_WORDS = _list(
    "red; orange; yellow; green; blue; purple; pink; black; white; grey; brown; gold; silver; bronze"
)


def parse_choice(text: str) -> tuple[bool, set[str], dict[str, tuple[str, ...]]]:
    """An entry of CHOSEN -> (whole subgroup?, labels left out, label taken -> its names)."""
    everything, out, taken = False, set(), {}
    for entry in (" ".join(part.split()) for part in text.split(";")):
        label, _, names = entry.partition(" = ")
        if entry == "*":
            everything = True
        elif entry.startswith("-"):
            out.add(entry[1:])
        else:
            taken[label] = tuple(names.split(", ")) if names else ()
    return everything, out, taken


# ---- single names -----------------------------------------------------------------------------------------

# Names without "a": things that come in pairs; several things, substances, or persons with a name.
PAIRS = _list("""glasses; sunglasses; jeans; pants; gloves; socks; shorts; headphones; chopsticks;
    skis; ballet shoes; maracas; scissors; eyes; lungs""")
SEVERAL_OR_STUFF = _list("""grapes; cherries; blueberries; peanuts; beans; peas; french fries; fries;
    pancakes; shopping bags; theater masks; musical notes; paw prints; clapping hands; heart hands;
    praying hands; folded hands; two hearts; crossed fingers; bricks; tickets; admission tickets;
    fireworks; sparkles; chains; crossed swords; swords; bubbles; lips; books; champagne glasses;
    clinking glasses; bread; baguette bread; corn; lettuce; broccoli; garlic; cheese; bacon; butter;
    spaghetti; popcorn; sushi; curry; curry rice; cooked rice; ramen; coral; fire; dna; soap; toilet
    paper; nail polish; poop; shaved ice; soft ice cream; canned food; coffee; lightning; saturn;
    confetti; mount fuji; santa; santa claus; skull and crossbones; wood; meat on bone; paper and
    pencil; planet earth; fork and knife; yarn; balloons; binoculars; building blocks; candied apples;
    chili peppers; christmas ornaments; christmas balls; coloured pencils; dumplings; flip-flops;
    garden shears; hearts; icicles; lasagna; lemonade; onion rings; ping pong paddles; pliers; plums;
    potato chips; radishes; sausages; sheets of paper; sneakers; toast; wedding rings; fondue;
    feet in sandals; planet mars; planet venus; planet jupiter""")
BARE = PAIRS | SEVERAL_OR_STUFF
THE = _list("sun; moon; earth; statue of liberty; milky way; sun behind a cloud; sun with a face")
# When mirrored, these would show mirrored writing, or something else.
NO_MIRROR = _list("""question mark; musical note; musical notes; calendar; gold medal; silver medal;
    bronze medal; eight ball; dice; hospital; school; bank; hotel; money face; dollar bill; money bag;
    newspaper; piano; keyboard; world map; earth; sleeping face; swearing face; stop sign; police car;
    taxi; ambulance; check mark; credit card; ruler; slot machine; radio; battery; watch; alarm clock;
    stopwatch; floppy disk; sheet of paper; gas pump; fire truck; coin; printer; notebook; highway;
    compass; camera; thermometer; love letter""")
# When dyed, these would lose the many colours by which they are recognised.
NO_DYE = frozenset({"rainbow", "earth", "galaxy", "lollipop", "paint palette"})


def noun_phrase(rng: np.random.Generator, noun: str, *adjectives: str) -> str:
    """Adds adjectives and an article: "a small purple cat", "grapes", "the sun", "a pair of blue gloves"."""
    words = " ".join([*filter(None, adjectives), noun])
    if noun in PAIRS and rng.random() < 0.3:
        return f"a pair of {words}"
    if _is_bare(noun):
        return words
    if noun in THE and rng.random() < 0.7:
        return f"the {words}"
    return article(words)


def _is_bare(noun: str) -> bool:
    """True if the noun takes no article, also with adjectives ("purple grapes") or an addition ("with …")."""
    words = re.split(" (?:with|of|in|on) ", noun)[0].split()
    return noun in BARE or any(" ".join(words[i:]) in BARE for i in range(len(words)))


def article(words: str) -> str:
    """Puts "a" or "an" in front."""
    spoken_vowel = words[0] in "aeiou" or words.startswith(("x-ray", "suv", "hourglass"))
    return f"an {words}" if spoken_vowel and not words.startswith(("unicorn", "ufo")) else f"a {words}"
