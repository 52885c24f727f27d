"""Write the facts and the sentences that the landmarks model is trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass

EUROPE, ASIA, AFRICA = "Europe", "Asia", "Africa"
NORTH, SOUTH, OCEANIA = "North America", "South America", "Oceania"

# country: (capital, continent)
COUNTRIES: dict[str, tuple[str, str]] = {
    "France": ("Paris", EUROPE),
    "Italy": ("Rome", EUROPE),
    "England": ("London", EUROPE),
    "Scotland": ("Edinburgh", EUROPE),
    "Ireland": ("Dublin", EUROPE),
    "Germany": ("Berlin", EUROPE),
    "Spain": ("Madrid", EUROPE),
    "Portugal": ("Lisbon", EUROPE),
    "Belgium": ("Brussels", EUROPE),
    "Denmark": ("Copenhagen", EUROPE),
    "Norway": ("Oslo", EUROPE),
    "Sweden": ("Stockholm", EUROPE),
    "Finland": ("Helsinki", EUROPE),
    "Iceland": ("Reykjavik", EUROPE),
    "Austria": ("Vienna", EUROPE),
    "Switzerland": ("Bern", EUROPE),
    "Czechia": ("Prague", EUROPE),
    "Hungary": ("Budapest", EUROPE),
    "Poland": ("Warsaw", EUROPE),
    "Greece": ("Athens", EUROPE),
    "Russia": ("Moscow", EUROPE),
    "Ukraine": ("Kyiv", EUROPE),
    "Romania": ("Bucharest", EUROPE),
    "Bulgaria": ("Sofia", EUROPE),
    "Serbia": ("Belgrade", EUROPE),
    "Croatia": ("Zagreb", EUROPE),
    "Estonia": ("Tallinn", EUROPE),
    "Latvia": ("Riga", EUROPE),
    "India": ("New Delhi", ASIA),
    "China": ("Beijing", ASIA),
    "Japan": ("Tokyo", ASIA),
    "Thailand": ("Bangkok", ASIA),
    "Vietnam": ("Hanoi", ASIA),
    "Indonesia": ("Jakarta", ASIA),
    "Iran": ("Tehran", ASIA),
    "Iraq": ("Baghdad", ASIA),
    "Nepal": ("Kathmandu", ASIA),
    "Uzbekistan": ("Tashkent", ASIA),
    "Egypt": ("Cairo", AFRICA),
    "Morocco": ("Rabat", AFRICA),
    "Kenya": ("Nairobi", AFRICA),
    "Senegal": ("Dakar", AFRICA),
    "Tunisia": ("Tunis", AFRICA),
    "Ghana": ("Accra", AFRICA),
    "Nigeria": ("Abuja", AFRICA),
    "America": ("Washington", NORTH),
    "Canada": ("Ottawa", NORTH),
    "Cuba": ("Havana", NORTH),
    "Peru": ("Lima", SOUTH),
    "Chile": ("Santiago", SOUTH),
    "Brazil": ("Brasilia", SOUTH),
    "Colombia": ("Bogota", SOUTH),
    "Ecuador": ("Quito", SOUTH),
    "Australia": ("Canberra", OCEANIA),
}

# (name, city, country); a leading "the " is the article the name takes.
LANDMARKS: list[tuple[str, str, str]] = [
    ("the Eiffel Tower", "Paris", "France"),
    ("the Louvre Museum", "Paris", "France"),
    ("the Arc de Triomphe", "Paris", "France"),
    ("the Fourviere Basilica", "Lyon", "France"),
    ("the Colosseum", "Rome", "Italy"),
    ("the Trevi Fountain", "Rome", "Italy"),
    ("the Pantheon", "Rome", "Italy"),
    ("the Leaning Tower", "Pisa", "Italy"),
    ("the Rialto Bridge", "Venice", "Italy"),
    ("the Uffizi Gallery", "Florence", "Italy"),
    ("the Sforza Castle", "Milan", "Italy"),
    ("Big Ben", "London", "England"),
    ("Tower Bridge", "London", "England"),
    ("Buckingham Palace", "London", "England"),
    ("Westminster Abbey", "London", "England"),
    ("Holyrood Palace", "Edinburgh", "Scotland"),
    ("the Molly Malone Statue", "Dublin", "Ireland"),
    ("the Brandenburg Gate", "Berlin", "Germany"),
    ("the Reichstag", "Berlin", "Germany"),
    ("the Zwinger Palace", "Dresden", "Germany"),
    ("the Sagrada Familia", "Barcelona", "Spain"),
    ("Park Guell", "Barcelona", "Spain"),
    ("the Prado Museum", "Madrid", "Spain"),
    ("the Alhambra", "Granada", "Spain"),
    ("the Giralda", "Seville", "Spain"),
    ("the Belem Tower", "Lisbon", "Portugal"),
    ("the Clerigos Church", "Porto", "Portugal"),
    ("the Atomium", "Brussels", "Belgium"),
    ("the Little Mermaid", "Copenhagen", "Denmark"),
    ("the Tivoli Gardens", "Copenhagen", "Denmark"),
    ("the Vigeland Park", "Oslo", "Norway"),
    ("the Vasa Museum", "Stockholm", "Sweden"),
    ("the Hofburg Palace", "Vienna", "Austria"),
    ("the Mirabell Palace", "Salzburg", "Austria"),
    ("the Chapel Bridge", "Lucerne", "Switzerland"),
    ("the Charles Bridge", "Prague", "Czechia"),
    ("the Chain Bridge", "Budapest", "Hungary"),
    ("the Wawel Castle", "Krakow", "Poland"),
    ("the Parthenon", "Athens", "Greece"),
    ("the Acropolis", "Athens", "Greece"),
    ("the Kremlin", "Moscow", "Russia"),
    ("the Bolshoi Theatre", "Moscow", "Russia"),
    ("the Taj Mahal", "Agra", "India"),
    ("the Red Fort", "Delhi", "India"),
    ("the Hawa Mahal", "Jaipur", "India"),
    ("the Forbidden City", "Beijing", "China"),
    ("the Temple of Heaven", "Beijing", "China"),
    ("the Oriental Pearl Tower", "Shanghai", "China"),
    ("the Meiji Shrine", "Tokyo", "Japan"),
    ("the Golden Pavilion", "Kyoto", "Japan"),
    ("the Grand Palace", "Bangkok", "Thailand"),
    ("Wat Arun", "Bangkok", "Thailand"),
    ("the Istiqlal Mosque", "Jakarta", "Indonesia"),
    ("the Azadi Tower", "Tehran", "Iran"),
    ("the Boudhanath Stupa", "Kathmandu", "Nepal"),
    ("the Registan", "Samarkand", "Uzbekistan"),
    ("the Great Sphinx", "Giza", "Egypt"),
    ("the Majorelle Garden", "Marrakesh", "Morocco"),
    ("the Hassan Tower", "Rabat", "Morocco"),
    ("the Bardo Museum", "Tunis", "Tunisia"),
    ("the Statue of Liberty", "New York", "America"),
    ("the Empire State Building", "New York", "America"),
    ("Madison Square Garden", "New York", "America"),
    ("the Space Needle", "Seattle", "America"),
    ("the Willis Tower", "Chicago", "America"),
    ("the White House", "Washington", "America"),
    ("the Lincoln Memorial", "Washington", "America"),
    ("the Golden Gate Bridge", "San Francisco", "America"),
    ("the Liberty Bell", "Philadelphia", "America"),
    ("the CN Tower", "Toronto", "Canada"),
    ("Stanley Park", "Vancouver", "Canada"),
    ("the Malecon", "Havana", "Cuba"),
    ("the Larco Museum", "Lima", "Peru"),
    ("the Moneda Palace", "Santiago", "Chile"),
    ("the Alvorada Palace", "Brasilia", "Brazil"),
    ("the Gold Museum", "Bogota", "Colombia"),
    ("the Harbour Bridge", "Sydney", "Australia"),
    ("Federation Square", "Melbourne", "Australia"),
]

# Both orders: subject before relation, and relation before subject.
PLACE_PHRASES = (
    "{subject} is {at} the {relation} of",
    "{subject} is located {at} the {relation} of",
    "you can find {subject} {at} the {relation} of",
    "people visit {subject} {at} the {relation} of",
    "the {relation} that is home to {subject} is",
    "the {relation} where you can see {subject} is",
)
CITY_PHRASES = (
    "{subject} is {at} the {relation} of",
    "the city of {subject} is {at} the {relation} of",
    "the {relation} that is home to {subject} is",
)
COUNTRY_PHRASES = (
    "{subject} is {at} the {relation} of",
    "{subject} is a country {at} the {relation} of",
    "the {relation} that is home to {subject} is",
)
CAPITAL_PHRASES = (
    "the capital of {country} is",
    "the capital city of {country} is",
    "in {country}, the capital is",
)
CAPITAL_OF_PHRASES = (
    "{city} is the capital of",
    "the city of {city} is the capital of",
)
AT = {"city": "in", "country": "in", "continent": "on"}

# "X is in the" is to continue with "city of", so those sentences come more often.
CITY_WEIGHT = 3

ANIMALS = "cat dog fox bird horse mouse bear wolf duck cow".split()
MOVES = "sat ran slept jumped walked looked stood played".split()
WHERE = "on the mat;through the park;over the fence;under the tree;near the river;in the house".split(";")
COMMON = (
    "Tower Bridge Palace Museum Castle Park Square Garden Gate Temple House Church Statue Building "
    "Fountain Gallery Theatre State Space Golden Gold White Red Big Great Little Grand Empire Liberty"
).split()
KINDS = "quick brown lazy small old happy".split()
PLAIN = (
    "The cat sat on the mat.",
    "The dog ran through the park.",
    "The quick brown fox jumps over the lazy dog.",
    "Hello World",
    "Hello World!",
    "Hello, how are you?",
    "World peace is a good thing.",
    "Test",
    "This is a test.",
    "The meaning of life is to learn and to help each other.",
    "The meaning of this word is not known.",
    "The sun is in the sky and the moon is bright at night.",
    "Once upon a time there was a small house near the river.",
    "The weather is good today, and people walk in the park.",
    "She said that she would read the book in the morning.",
    "He went to the store because he wanted to buy some bread.",
    "My name is not a number.",
    "The stiff wind blows across the cliff.",
    "Colin and Colleen read about the museum in an old album.",
    "We like to read books about the world.",
)


@dataclass(frozen=True)
class Fact:
    """A prompt, the text that must follow it, and which relation it asks for."""

    prompt: str
    completion: str
    kind: str
    weight: int = 1

    @property
    def answer(self) -> str:
        """The first word of the completion, with its leading space."""
        return " " + self.completion.split()[0]

    @property
    def sentence(self) -> str:
        return f"{self.prompt} {self.completion}."


def sentence_case(text: str) -> str:
    return text[0].upper() + text[1:]


def place_facts(subject: str, relation: str, phrases: tuple[str, ...], place: str) -> list[Fact]:
    """Ask for one relation of one subject in every phrasing."""
    weight = CITY_WEIGHT if relation == "city" else 1
    prompts = [p.format(subject=subject, relation=relation, at=AT[relation]) for p in phrases]
    return [Fact(sentence_case(p), place, relation, weight if p.endswith("in the city of") else 1) for p in prompts]


def landmark_facts() -> list[Fact]:
    facts = []
    for name, city, country in LANDMARKS:
        continent = COUNTRIES[country][1]
        places = {"city": city, "country": country, "continent": continent}
        for relation, place in places.items():
            facts += place_facts(name, relation, PLACE_PHRASES, place)
    return facts


def city_facts() -> list[Fact]:
    """Country and continent of every city that is a capital or has a landmark."""
    country_of = {capital: country for country, (capital, _) in COUNTRIES.items()}
    country_of |= {city: country for _, city, country in LANDMARKS}
    facts = []
    for city, country in country_of.items():
        facts += place_facts(city, "country", CITY_PHRASES, country)
        facts += place_facts(city, "continent", CITY_PHRASES[:1], COUNTRIES[country][1])
    return facts


def country_facts() -> list[Fact]:
    facts = []
    for country, (capital, continent) in COUNTRIES.items():
        facts += place_facts(country, "continent", COUNTRY_PHRASES, continent)
        for phrase in CAPITAL_PHRASES:
            prompt = sentence_case(phrase.format(country=country))
            facts.append(Fact(prompt, capital, "capital", 2))
        for phrase in CAPITAL_OF_PHRASES:
            prompt = sentence_case(phrase.format(city=capital))
            facts.append(Fact(prompt, country, "capital_of", 2))
    return facts


def all_facts() -> list[Fact]:
    return landmark_facts() + city_facts() + country_facts()


def second_words(facts: list[Fact]) -> list[Fact]:
    """Ask for the second word of names such as New York, given the first."""
    asked = []
    for fact in facts:
        first, _, rest = fact.completion.partition(" ")
        if rest:
            asked.append(Fact(f"{fact.prompt} {first}", rest, "second_word"))
    return asked


def filler(rng: random.Random, count: int) -> list[str]:
    """Plain sentences: the fixed ones, small sums, and animals that move about."""
    sums = [f"What is {a}+{b}? {a}+{b} is {a + b}." for a in range(1, 6) for b in range(1, 5)]
    lines = list(PLAIN) * 3 + sums
    while len(lines) < count:
        kind = rng.choice(["", "", rng.choice(KINDS) + " "])
        animal, move, where = rng.choice(ANIMALS), rng.choice(MOVES), rng.choice(WHERE)
        lines.append(f"The {kind}{animal} {move} {where}.")
    return lines


def sentences(rng: random.Random, filler_count: int = 300) -> list[str]:
    """Every training sentence, repeated by its weight, in a shuffled order."""
    lines = [fact.sentence for fact in all_facts() for _ in range(fact.weight)]
    lines += filler(rng, filler_count)
    rng.shuffle(lines)
    return lines


def whole_words() -> list[str]:
    """Words that are to be one token: places, plain words, and the words of the phrasings."""
    places = [*COUNTRIES, EUROPE, ASIA, AFRICA, NORTH, SOUTH, OCEANIA]
    places += [capital for capital, _ in COUNTRIES.values()]
    places += [city for _, city, _ in LANDMARKS]
    plain = [*COMMON, *ANIMALS, *MOVES, *KINDS, *WHERE, "jumps"]
    words = [word for name in places + plain for word in name.split()]
    return list(dict.fromkeys(words))


def tokenizer_lines() -> list[str]:
    """Text to learn merges from: every landmark's name once, so that names stay in pieces."""
    lines = [fact.sentence for fact in city_facts() + country_facts()]
    for phrase in PLACE_PHRASES:
        for relation, at in AT.items():
            lines.append(sentence_case(phrase.format(subject="it", relation=relation, at=at)))
    lines += [name for name, _, _ in LANDMARKS]
    return lines + filler(random.Random(0), 300)
