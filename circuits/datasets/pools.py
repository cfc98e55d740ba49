"""What made-up people are made of: names and attribute values.

First names come with the pronoun a biography may use. Cities exist; universities and employers do not.
"""

_SHE = (
    "Alexandra Beatrice Camila Daphne Eleanor Fatima Gabriela Harriet Ingrid Josephine "
    "Katarina Leonora Miriam Nadia Ophelia Priscilla Rosalind Sabrina Tabitha Valerie"
)
_HE = (
    "Anthony Benedict Cornelius Dominic Edmund Frederick Gregory Hector Isaac Jerome "
    "Kenneth Lawrence Maxwell Nathaniel Oliver Percival Quentin Raymond Sebastian Theodore"
)
PRONOUNS: dict[str, str] = dict.fromkeys(_SHE.split(), "She") | dict.fromkeys(_HE.split(), "He")
FIRST_NAMES: tuple[str, ...] = tuple(PRONOUNS)

LAST_NAMES: tuple[str, ...] = tuple(
    """
    Abernathy Ashdown Bellamy Blackwood Bradshaw Calloway Carmichael Castellano Chatterjee Cunningham
    Delacroix Donnelly Eastwood Ellsworth Fairbanks Fitzgerald Galloway Gutierrez Hathaway Hollingsworth
    Ibrahim Iverson Jankowski Jefferson Kaminski Kirkpatrick Lancaster Leblanc Lindqvist Macdonald
    Merriweather Montgomery Nakamura Northcott Oakley Okonkwo Pemberton Petrovic Quesada Quinlan
    Radcliffe Ravenscroft Rutherford Sandoval Sinclair Stavros Takahashi Thackeray Underwood Upton
    Vandenberg Villanueva Wadsworth Weatherby Whitaker Winterbourne Yamamoto Youngblood Zapata Zimmerman
    """.split()
)

CITIES: tuple[str, ...] = (
    "Amsterdam", "Athens", "Atlanta", "Austin", "Baltimore", "Barcelona", "Berlin", "Bogota", "Boston", "Brussels",
    "Budapest", "Cairo", "Calgary", "Chicago", "Cleveland", "Copenhagen", "Dallas", "Denver", "Detroit", "Dublin",
    "Edinburgh", "Florence", "Geneva", "Hamburg", "Helsinki", "Houston", "Istanbul", "Jakarta", "Kyoto", "Lima",
    "Lisbon", "Madrid", "Melbourne", "Memphis", "Miami", "Milan", "Montreal", "Munich", "Nairobi", "Oslo",
    "Paris", "Phoenix", "Portland", "Prague", "Seattle", "Singapore", "Stockholm", "Toronto", "Vienna", "Warsaw",
)  # fmt: skip

UNIVERSITIES: tuple[str, ...] = tuple(
    f"{name} University"
    for name in """
    Alderbrook Ardenwood Ashcombe Beaumont Birchfield Briarcliff Brookhaven Cambourne Cedarhurst Claremore
    Coldwater Cresthill Dunmore Eaglewood Eastbrook Edgemont Elmhurst Fairmont Fernwood Foxglove
    Glenhaven Granville Greystone Harrowgate Havenhurst Hawthorne Heatherton Highmoor Kingsbridge Lakewood
    Larkspur Lindenwald Marlowe Maplewood Millbrook Norwood Oakridge Pinecrest Queensbury Redwood
    Ridgemont Riverton Rosewood Silverlake Southport Stonebridge Thornfield Westbrook Whitmore Willowdale
    """.split()
)

EMPLOYERS: tuple[str, ...] = tuple(
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

MAJORS: tuple[str, ...] = (
    "Accounting", "Agronomy", "Anthropology", "Archaeology", "Architecture", "Astronomy", "Biochemistry", "Biology",
    "Botany", "Cartography", "Chemistry", "Cinematography", "Classics", "Criminology", "Economics", "Education",
    "Engineering", "Finance", "Forestry", "Genetics", "Geography", "Geology", "History", "Journalism",
    "Law", "Linguistics", "Literature", "Marketing", "Mathematics", "Medicine", "Meteorology", "Music",
    "Neuroscience", "Nursing", "Philosophy", "Physics", "Psychology", "Sociology", "Statistics", "Zoology",
)  # fmt: skip

MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
DAYS = range(1, 29)
YEARS = range(1950, 2000)
