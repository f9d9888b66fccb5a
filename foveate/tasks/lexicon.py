"""Things people name when they describe a photo, for questions of the form "Is there a dog ...?".

Each line: ``asked phrase | words that name it | words that leave it open``. Plurals are added. A
photo is a yes when two or more captions use a naming word, a no when none uses a naming word or
one that leaves it open (a "player" may well be a man), and otherwise it is not asked about.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

_PERSON = (
    "person people someone somebody player athlete biker cyclist bicyclist rider skier "
    "snowboarder skateboarder surfer climber hiker runner swimmer performer dancer musician "
    "worker fan crowd group team couple family adult teenager teen kid child children toddler "
    "baby youth skater motorcyclist driver jogger fisherman cowboy soldier officer guitarist "
    "singer band rollerblader kayaker racer goalie wrestler acrobat pedestrian tourist spectator "
    "bride groom wedding individual friend human pitcher batter catcher gymnast diver crew "
    "audience parade actor artist clown waiter vendor elderly cheerleader skydiver wakeboarder "
    "parasailer sledder participant competitor opponent hockey rower"
)
_ADULT = "guy gentleman lady male female men women man woman boy girl " + _PERSON

_LINES = f"""
a man | man men guy gentleman | boy male {_PERSON}
a woman | woman women lady ladies | girl female {_PERSON}
a boy | boy | man men male guy girl {_PERSON}
a girl | girl | woman women lady female boy {_PERSON}
a child | child children kid toddler boy girl baby infant | {_ADULT} little young
a baby | baby infant toddler | {_ADULT} little young
a dog | dog puppy puppies poodle greyhound terrier retriever bulldog dachshund collie canine | \
animal shepherd lab labrador husky pet hound boxer spaniel
a cat | cat kitten | animal pet
a horse | horse pony ponies | animal cowboy rider rodeo polo carriage bull donkey
a bird | bird duck seagull goose geese pigeon parrot eagle swan | animal wings
snow | snow snowy | ice winter ski skier skiing snowboard snowboarder snowboarding sled cold slope \
frozen
ice | ice icy | snow snowy winter frozen hockey skating cold
water | water ocean lake river pool sea pond stream | beach wave surf surfer surfing swim swimming \
swimmer boat kayak canoe raft shore wet splash splashing fountain waterfall bath puddle rapids \
dock bay creek wading sprinkler diving snorkeling underwater rain
the ocean | ocean sea | water beach wave surf surfer surfing surfboard shore coast bay boat lake \
sand island
a beach | beach beaches | sand ocean shore sea wave surf surfer surfing coast lake water sandy
a swimming pool | pool | swim swimming swimmer water slide inflatable dive diving backyard
a river | river stream creek rapids | water lake kayak canoe raft rafting pond waterfall bridge \
fishing fisherman
a wave | wave | surf surfer surfing surfboard ocean sea water splash
sand | sand sandy | beach desert dirt dune shore volleyball ocean sandbox
grass | grass grassy lawn | field yard park meadow green soccer football outside hill baseball \
golf leaves weeds plants
dirt | dirt muddy mud dusty | ground path trail road track field bmx motocross sand hill desert \
rock
mud | mud muddy | dirt dirty puddle wet
a field | field meadow | grass grassy soccer football baseball park lawn yard player pasture hill \
rugby
a tree | tree forest woods wooded branch | park log leaves outside outdoors trail jungle yard palm \
mountain hill path camping garden
leaves | leaves | tree leaf forest woods autumn fall
flowers | flower | plant garden bouquet blossom lei bride wedding
a mountain | mountain mountainous mountaintop | hill cliff rock rocky peak climb climber climbing \
hiker hiking hike snowy ski slope summit landscape canyon valley scenery
a hill | hill hillside hilltop | mountain slope cliff dune trail ramp ski sled grassy ridge
a rock | rock rocky boulder stone cliff | mountain climbing climber canyon pebbles hiker ground \
beach
a wall | wall | building graffiti brick room climbing mural fence painting
a fence | fence fenced | gate railing rail wall yard barrier horse baseball
a building | building skyscraper tower church house | city street store urban downtown window town \
restaurant shop balcony roof wall sidewalk door school hotel mall castle
a street | street road | city sidewalk car traffic downtown town urban crosswalk intersection bus \
parade pavement path driveway highway lane
a sidewalk | sidewalk | street path city building pavement walkway road downtown bench curb
a road | road highway | street path car track trail dirt lane driveway race
a bridge | bridge | walkway overpass dock pier boardwalk
stairs | stairs steps staircase stairway stair step | ramp rail railing ladder skateboard stoop \
handrail
a bench | bench | seat chair sitting sits sit picnic
a chair | chair armchair | seat sitting sits sit bench couch stool table wheelchair lounge
a table | table | desk counter restaurant eating dinner picnic food bar meal drink cafe
a bed | bed | sleeping mattress pillow bedroom trampoline blanket couch
a couch | couch sofa | chair sitting seat furniture bed
a window | window | building glass store train bus
a car | car jeep sedan | vehicle truck traffic street road parking van race racing taxi driver \
driving drive bus automobile suv
a truck | truck pickup | vehicle car jeep tractor van bus trailer
a bus | bus | vehicle train van tour
a train | train subway | railroad station track platform
a motorcycle | motorcycle motorbike dirtbike | bike biker motorcyclist motocross atv vehicle race \
racing racer rider scooter moped helmet
a bicycle | bike bicycle bmx biker cyclist bicyclist | motorcycle motorbike dirtbike motocross \
rider race racing tricycle unicycle scooter cycling cycle pedal wheel biking motorcyclist
a boat | boat canoe kayak raft ship sailboat rowboat | water ocean lake river paddle rowing dock \
kayaker kayaking rafting sail harbor paddling
a kayak or canoe | kayak canoe kayaking kayaker | boat raft paddle rafting rowing paddling rapids
a skateboard | skateboard skateboarder skateboarding | skater skate board ramp trick rollerblade \
scooter skating rollerblading
a surfboard | surfboard surfer surfing | surf board wave bodyboard boogie wakeboard windsurfing \
sail
a snowboard | snowboard snowboarder snowboarding | ski board snow skier skiing slope
skis | ski skier skiing | snow snowboard snowboarder slope snowboarding waterski jet
a sled | sled sledding tobaggan toboggan | snow snowy tube ski slide
a ball | ball basketball football soccer baseball volleyball rugby softball | tennis toy game \
sport player playing plays play fetch court golf hockey cricket bowling lacrosse catch goal \
pitcher throw balloon
a basketball | basketball | ball hoop court player dunk
a football | football | ball rugby player uniform game team soccer
a soccer ball | soccer | ball football goal player kick kicking kicks goalie game
a tennis racket | racket racquet tennis | player court badminton
a baseball player | baseball softball | player bat batter pitcher catcher base uniform ball game \
glove cricket
a frisbee | frisbee | disc toy disk catch throw object dog
a stick | stick | branch log pole bat toy hockey wood cane
a rope | rope | climbing climber leash harness swing cord string tug bungee wakeboard pulling \
ladder
a leash | leash | dog collar rope harness
a ramp | ramp | skateboard skate skateboarder bmx trick jump halfpipe rail
a swing | swing | playground hammock swinging tire rope
a slide | slide | playground pool inflatable sliding
a trampoline | trampoline | bounce bouncing jumping jump inflatable bed
a fountain | fountain | water sprinkler splash pool waterfall
a waterfall | waterfall | water river stream rapids fountain cliff
a tent | tent | camp camping canopy awning tarp umbrella campsite
an umbrella | umbrella parasol | rain shade canopy
a flag | flag | banner parade pole
a sign | sign | poster banner billboard protest store advertisement
a guitar | guitar guitarist | instrument band musician music concert playing performing stage
a microphone | microphone mic | sing singing singer stage performing concert band interview \
karaoke
a book | book | reading read reads newspaper magazine paper
a phone | phone cellphone telephone | talking talks cell
a hat | hat cap beanie | helmet costume cowboy baseball hood headdress santa bandanna headgear \
crown uniform hardhat turban visor winter
a helmet | helmet | bike biker bicycle bmx motorcycle football hockey rider racer race \
skateboarder motocross climber goggles hat headgear player uniform atv
sunglasses | sunglasses | glasses goggles shades
glasses | glasses sunglasses eyeglasses | goggles shades
a jacket | jacket coat parka | suit vest sweater sweatshirt hoodie clothing clothes gear snow \
winter dressed uniform outfit wearing leather
a dress | dress gown | bride wedding dressed costume skirt outfit robe dance wearing
a suit | suit tuxedo | tie dressed groom uniform jacket costume wetsuit business formal
a backpack | backpack | hiker pack bag hiking luggage gear
a bag | bag purse handbag | backpack luggage suitcase shopping sack carrying
a toy | toy doll | ball frisbee stuffed balloon playing plays play game puppet lego chew
a fire | fire campfire bonfire | flame flames burning torch smoke fireworks candle grill
food | food meal pizza sandwich cake | eating eat eats ice dinner lunch restaurant picnic snack \
cooking cream corn fruit apple grill banana candy table kitchen
a crowd of people | crowd audience spectators | group people parade concert team race festival \
fans protest busy gathered many
"""


@dataclass(frozen=True)
class Thing:
    """One askable thing: its phrase and the patterns that name it or leave it open."""

    phrase: str
    names: frozenset[str]
    open: frozenset[str]

    @property
    def verb(self) -> str:
        """Is or Are, by the phrase."""
        plural = self.phrase in ("leaves", "flowers", "stairs", "skis", "sunglasses", "glasses")
        return "Are" if plural else "Is"


@cache
def things() -> tuple[Thing, ...]:
    """The lexicon, in a fixed order."""
    found = []
    for line in _LINES.strip().splitlines():
        phrase, names, unsure = (part.strip() for part in line.split("|"))
        named = _with_plurals(names)
        found.append(Thing(phrase, named, _with_plurals(unsure) - named))
    return tuple(found)


def words(caption: str) -> frozenset[str]:
    """The lower-case words of a caption."""
    return frozenset(re.findall(r"[a-z]+", caption.lower()))


def _with_plurals(text: str) -> frozenset[str]:
    singular = text.split()
    return frozenset(singular) | {_plural(word) for word in singular}


def _plural(word: str) -> str:
    if word.endswith(("s", "ch", "sh", "x")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2] not in "aeiou" else word + "s"
