"""What made-up people are made of: names and attribute values.

The ``invented`` pools have names that nobody's training data ties to anything: cities exist, universities and
employers do not. In the ``familiar`` pools every name and value is a common word that a pretrained model knows, and a
single token of its vocabulary, so that rows are short and there is little to learn but who goes with what; people
are as made up as before. First names come with the pronoun a biography may use.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pools:
    """What the names and facts of people are drawn from.

    Attributes:
        pronouns: first name → ``She`` or ``He``.
        last_names: last names.
        cities: of birth and of work.
        universities: values of ``university``.
        employers: values of ``employer``.
        majors: values of ``major``.
    """

    pronouns: dict[str, str]
    last_names: tuple[str, ...]
    cities: tuple[str, ...]
    universities: tuple[str, ...]
    employers: tuple[str, ...]
    majors: tuple[str, ...]

    @property
    def first_names(self) -> tuple[str, ...]:
        """The first names, in order."""
        return tuple(self.pronouns)

    @property
    def most_people(self) -> int:
        """How many people can have names of their own: first × middle × last."""
        return len(self.pronouns) * len(self.last_names) ** 2


_SHE = (
    "Alexandra Beatrice Camila Daphne Eleanor Fatima Gabriela Harriet Ingrid Josephine "
    "Katarina Leonora Miriam Nadia Ophelia Priscilla Rosalind Sabrina Tabitha Valerie"
)
_HE = (
    "Anthony Benedict Cornelius Dominic Edmund Frederick Gregory Hector Isaac Jerome "
    "Kenneth Lawrence Maxwell Nathaniel Oliver Percival Quentin Raymond Sebastian Theodore"
)
_PRONOUNS = dict.fromkeys(_SHE.split(), "She") | dict.fromkeys(_HE.split(), "He")
_LAST_NAMES = tuple(
    """
    Abernathy Ashdown Bellamy Blackwood Bradshaw Calloway Carmichael Castellano Chatterjee Cunningham
    Delacroix Donnelly Eastwood Ellsworth Fairbanks Fitzgerald Galloway Gutierrez Hathaway Hollingsworth
    Ibrahim Iverson Jankowski Jefferson Kaminski Kirkpatrick Lancaster Leblanc Lindqvist Macdonald
    Merriweather Montgomery Nakamura Northcott Oakley Okonkwo Pemberton Petrovic Quesada Quinlan
    Radcliffe Ravenscroft Rutherford Sandoval Sinclair Stavros Takahashi Thackeray Underwood Upton
    Vandenberg Villanueva Wadsworth Weatherby Whitaker Winterbourne Yamamoto Youngblood Zapata Zimmerman
    """.split()
)

_CITIES = (
    "Amsterdam", "Athens", "Atlanta", "Austin", "Baltimore", "Barcelona", "Berlin", "Bogota", "Boston", "Brussels",
    "Budapest", "Cairo", "Calgary", "Chicago", "Cleveland", "Copenhagen", "Dallas", "Denver", "Detroit", "Dublin",
    "Edinburgh", "Florence", "Geneva", "Hamburg", "Helsinki", "Houston", "Istanbul", "Jakarta", "Kyoto", "Lima",
    "Lisbon", "Madrid", "Melbourne", "Memphis", "Miami", "Milan", "Montreal", "Munich", "Nairobi", "Oslo",
    "Paris", "Phoenix", "Portland", "Prague", "Seattle", "Singapore", "Stockholm", "Toronto", "Vienna", "Warsaw",
)  # fmt: skip

_UNIVERSITIES = tuple(
    f"{name} University"
    for name in """
    Alderbrook Ardenwood Ashcombe Beaumont Birchfield Briarcliff Brookhaven Cambourne Cedarhurst Claremore
    Coldwater Cresthill Dunmore Eaglewood Eastbrook Edgemont Elmhurst Fairmont Fernwood Foxglove
    Glenhaven Granville Greystone Harrowgate Havenhurst Hawthorne Heatherton Highmoor Kingsbridge Lakewood
    Larkspur Lindenwald Marlowe Maplewood Millbrook Norwood Oakridge Pinecrest Queensbury Redwood
    Ridgemont Riverton Rosewood Silverlake Southport Stonebridge Thornfield Westbrook Whitmore Willowdale
    """.split()
)

_EMPLOYERS = tuple(
    f"{name} {kind}"
    for kind, names in {
        "Labs": "Acuity Borealis Cobalt Dynamo Everlight Fathom Gemini Helix Ionix Juniper",
        "Group": "Keystone Lumina Meridian Nimbus Orbital Pinnacle Quasar Ridgeline Summit Tidewater",
        "Systems": "Umbra Vertex Wavelength Xenon Yellowtail Zephyr Apexion Brightside Crestline Driftwood",
        "Partners": "Ember Falcon Graphite Harbor Indigo Jasper Kestrel Lantern Mosaic Northstar",
        "Foods": "Obsidian Paragon Quartz Rampart Sapphire Titan Unity Vanguard Wildflower Zenith",
    }.items()
    for name in names.split()
)

_MAJORS = (
    "Accounting", "Agronomy", "Anthropology", "Archaeology", "Architecture", "Astronomy", "Biochemistry", "Biology",
    "Botany", "Cartography", "Chemistry", "Cinematography", "Classics", "Criminology", "Economics", "Education",
    "Engineering", "Finance", "Forestry", "Genetics", "Geography", "Geology", "History", "Journalism",
    "Law", "Linguistics", "Literature", "Marketing", "Mathematics", "Medicine", "Meteorology", "Music",
    "Neuroscience", "Nursing", "Philosophy", "Physics", "Psychology", "Sociology", "Statistics", "Zoology",
)  # fmt: skip

_FAMILIAR_SHE = """
    Alice Amanda Amy Angela Anna Ashley Barbara Betty Carol Catherine Charlotte Christina Christine Clara
    Deborah Diana Diane Eleanor Elizabeth Ellen Emily Emma Eva Grace Heather Helen Jane Janet Jennifer Jessica
    Joyce Julia Julie Karen Katherine Kathleen Kelly Laura Lauren Lily Linda Lisa Lucy Margaret Maria Martha
    Mary Melissa Michelle Nancy Nicole Olivia Patricia Rachel Rebecca Rose Ruth Samantha Sandra Sarah Sharon
    Shirley Sophie Stephanie Susan Victoria Virginia
"""
_FAMILIAR_HE = """
    Aaron Adam Albert Alexander Andrew Anthony Arthur Benjamin Brian Charles Daniel David Dennis Donald Edward
    Eric Frank Gary George Gregory Harold Henry Jack Jacob James Jason Jeffrey Jerry John Jonathan Joseph
    Joshua Justin Kenneth Kevin Larry Mark Matthew Michael Nathan Nicholas Patrick Paul Peter Raymond Richard
    Robert Ronald Ryan Samuel Scott Stephen Steven Thomas Timothy Tyler Walter William
"""
_FAMILIAR_LAST_NAMES = """
    Adams Allen Anderson Bailey Baker Bennett Black Brooks Brown Burns Campbell Carter Chavez Clark Cole
    Collins Cook Cooper Cox Crawford Cruz Davis Dixon Edwards Evans Fisher Foster Franklin Freeman Garcia
    Gordon Graham Gray Green Griffin Hall Hamilton Harris Hayes Henderson Hill Hughes Hunt Hunter Jackson
    Johnson Jones Jordan Kim King Lee Lewis Long Lopez Marshall Martinez Mason Miller Mills Mitchell Moore
    Morgan Morris Murphy Murray Myers Nelson Owens Palmer Parker Patel Peterson Phillips Porter Price Reed
    Reynolds Richardson Rivera Roberts Robinson Rodriguez Rogers Ross Sanders Shaw Simpson Smith Stevens
    Stewart Stone Sullivan Taylor Thompson Torres Tucker Turner Walker Wallace Ward Warren Watson Webb Webster
    Wells West White Williams Wilson Wood Woods Wright Young
"""
_FAMILIAR_CITIES = """
    Amsterdam Athens Atlanta Austin Baltimore Barcelona Berlin Boston Brussels Budapest Cairo Calgary Chicago
    Cleveland Copenhagen Dallas Denver Detroit Dublin Edinburgh Florence Geneva Hamburg Helsinki Houston
    Istanbul Kyoto Lima Lisbon Madrid Melbourne Memphis Miami Milan Montreal Munich Oslo Paris Phoenix
    Portland Prague Seattle Singapore Stockholm Toronto Vienna Warsaw
"""
_FAMILIAR_UNIVERSITIES = """
    Berkeley Bristol Brown Caltech Cambridge Columbia Cornell Dartmouth Duke Durham Emory Exeter Georgetown
    Glasgow Harvard Howard Leeds MIT Manchester McGill Northwestern Nottingham Oxford Penn Princeton Purdue
    Rice Rutgers Sheffield Stanford Syracuse Temple Vanderbilt Warwick Yale
"""
_FAMILIAR_EMPLOYERS = """
    Adobe Amazon Apple Bayer Boeing Canon Cisco Dell Disney Facebook Ford Google IBM Intel Lockheed Microsoft
    Netflix Nike Nintendo Oracle Pfizer Samsung Shell Sony Target Tesla Toyota Twitter Uber
"""
_FAMILIAR_MAJORS = """
    accounting anthropology archaeology architecture astronomy biochemistry biology chemistry economics
    education engineering finance genetics geography geology history journalism law linguistics literature
    marketing mathematics medicine music neuroscience nursing philosophy physics psychology sociology
    statistics
"""

POOLS: dict[str, Pools] = {
    "invented": Pools(_PRONOUNS, _LAST_NAMES, _CITIES, _UNIVERSITIES, _EMPLOYERS, _MAJORS),
    "familiar": Pools(
        dict.fromkeys(_FAMILIAR_SHE.split(), "She") | dict.fromkeys(_FAMILIAR_HE.split(), "He"),
        *(
            tuple(words.split())
            for words in (
                _FAMILIAR_LAST_NAMES,
                _FAMILIAR_CITIES,
                _FAMILIAR_UNIVERSITIES,
                _FAMILIAR_EMPLOYERS,
                _FAMILIAR_MAJORS,
            )
        ),
    ),
}

MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
DAYS = range(1, 29)
YEARS = range(1950, 2000)
