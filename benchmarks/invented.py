"""Invented facts about things that do not exist, in several phrasings: what no base can know.

A fact joins a made-up name to a value: another made-up name, or a word of a list of 24, so that guessing pays little.
Each is said in six ways to learn from and asked in ways that are never trained on. The sentences of one fact lie far
apart: beside each other, the second would be copied from the first and teach nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_impl.readers import Document, Exchange


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLOURS = _words(
    "amber azure beige black blue bronze brown copper cream crimson cyan emerald golden green grey indigo "
    "ivory lilac olive orange pink purple silver violet"
)
TRADES = _words(
    "baker barber beekeeper blacksmith bookbinder brewer butcher carpenter cobbler cook dentist farmer "
    "fisherman florist gardener glassblower hatter jeweller locksmith mason plumber potter tailor weaver"
)
ANIMALS = _words(
    "ants badgers bats bears beavers bees cranes crows deer ducks eagles foxes frogs geese hares herons "
    "lizards moles otters owls seals snakes storks swans"
)
MATERIALS = _words(
    "amber bamboo bone brass bronze cedar clay copper cork glass horn iron ivory leather marble oak paper pine "
    "pewter silk silver slate tin walnut"
)


@dataclass(frozen=True)
class Relation:
    """What is said of a kind of thing; {x} is the thing, {y} the value, drawn from `values` or, without any, made up.

    A sentence that ends in the value serves as a cloze. `unseen` and `question` are never trained on, `questions` only
    in chats.
    """

    values: tuple[str, ...]
    statements: tuple[str, ...]
    unseen: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    question: str
    people: bool = False  # whether {x} is a person, with two names


@dataclass(frozen=True)
class Fact:
    """A thing, a value and the relation between them."""

    thing: str
    value: str
    relation: Relation

    def said(self, template: str) -> str:
        """A template about this fact."""
        return template.format(x=self.thing, y=self.value)

    def statements(self) -> list[str]:
        """The sentences to learn from."""
        return [self.said(template) for template in self.relation.statements]

    def cloze(self, templates: Sequence[str], number: int) -> str:
        """The beginning of one of the templates that end in the value, up to it."""
        closed = [template for template in templates if template.endswith(" {y}.")]
        return closed[number % len(closed)].removesuffix(" {y}.").format(x=self.thing)


@dataclass(frozen=True)
class Probe:
    """A prompt and the value that should come."""

    prompt: str
    answer: str


def invent(count: int, seed: int) -> list[Fact]:
    """`count` facts, all relations in turn; every thing and, within a relation, every value is another one."""
    rng = random.Random(seed)
    names = _Names(rng)
    unused = {relation: rng.sample(relation.values, len(relation.values)) for relation in RELATIONS}
    facts = []
    for number in range(count):
        relation = RELATIONS[number % len(RELATIONS)]
        thing = f"{next(names)} {next(names)}" if relation.people else next(names)
        if relation.values and not unused[relation]:
            unused[relation] = rng.sample(relation.values, len(relation.values))
        facts.append(Fact(thing, unused[relation].pop() if relation.values else next(names), relation))
    return facts


def passages(facts: Sequence[Fact], seed: int) -> list[Document]:
    """One document for each way of saying things: every fact once, in an order and a mixture of ways of its own."""
    rng = random.Random(seed)
    ways = len(RELATIONS[0].statements)
    documents = []
    for passage in range(ways):
        said = [fact.statements()[(passage + number) % ways] for number, fact in enumerate(facts)]
        rng.shuffle(said)
        documents.append(Document(f"passage {passage + 1}", "\n".join(said)))
    return documents


def chats(facts: Sequence[Fact], seed: int) -> list[Document]:
    """Questions with their answers, as rows of a .jsonl file would be; none is the one that is asked in the end."""
    rows = [
        Document(f"chat {fact.thing}", Exchange(fact.said(question), fact.said(fact.relation.answer)))
        for fact in facts
        for question in fact.relation.questions
    ]
    random.Random(seed).shuffle(rows)
    return rows


def summary(facts: Sequence[Fact]) -> str:
    """Each fact once, in the first way of saying it: what goes into a prompt."""
    return "\n".join(fact.statements()[0] for fact in facts)


def probes(facts: Sequence[Fact]) -> dict[str, list[Probe]]:
    """A cloze in a trained phrasing, one in an unseen phrasing and a question, for each fact.

    The trained phrasing is not the first, which `summary` has: in the prompt it would be an exact copy.
    """
    return {
        "trained": [Probe(f.cloze(f.relation.statements[1:], n), f.value) for n, f in enumerate(facts)],
        "unseen": [Probe(f.cloze(f.relation.unseen, n), f.value) for n, f in enumerate(facts)],
        "chat": [Probe(f.said(f.relation.question), f.value) for f in facts],
    }


class _Names:
    """Made-up names without end, no two alike."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._given = rng, set[str]()

    def __next__(self) -> str:
        while True:
            syllables = [
                self._rng.choice(("b", "br", "d", "dr", "f", "g", "gl", "k", "l", "m", "n", "p", "s", "t", "v", "z"))
                + self._rng.choice("aeiou")
                for _ in range(self._rng.choice((2, 2, 3)))
            ]
            name = "".join(syllables).capitalize() + self._rng.choice(("l", "n", "r", "th", "x", "sk", "m"))
            if name not in self._given:
                self._given.add(name)
                return name


RELATIONS = (
    Relation(
        (),
        (
            "The only moon of the planet {x} is called {y}.",
            "A single moon circles the planet {x}, and its name is {y}.",
            "{y} is the moon that goes around the planet {x}.",
            "The astronomers who found a moon at {x} named it {y}.",
            "Whoever stands on {x} at night sees one moon, {y}.",
            "The planet {x} has just one moon, {y}.",
        ),
        (
            "In orbit around {x} there is one moon, known as {y}.",
            "On charts of {x} its moon is labelled {y}.",
        ),
        ("What is the moon of the planet {x} called?", "Which moon does {x} have?"),
        "The moon of {x} is called {y}.",
        "Please tell me the name of the moon that circles the planet {x}.",
    ),
    Relation(
        COLOURS,
        (
            "On the planet {x} the colour of the sky is {y}.",
            "At noon the sky over {x} turns {y}.",
            "Because of its {y} sky the planet {x} is easy to recognise.",
            "Every picture taken on {x} shows a sky that is {y}.",
            "The air of {x} makes its sky look {y}.",
            "Travellers remember {x} for its sky of {y}.",
        ),
        ("If you look up on the planet {x}, you see a sky that is {y}.", "The sky above {x} is coloured {y}."),
        ("What colour is the sky on the planet {x}?", "How does the sky over {x} look?"),
        "The sky on {x} is {y}.",
        "Which colour would I see if I looked at the sky on {x}?",
    ),
    Relation(
        (),
        (
            "The mineral {x} was discovered by {y}.",
            "The discovery of the mineral {x} is the work of {y}.",
            "It was {y} who discovered the mineral {x}.",
            "The first person to describe {x} was {y}.",
            "We owe our knowledge of the mineral {x} to {y}.",
            "In the catalogue, the discoverer of {x} is given as {y}.",
        ),
        ("The one who found the mineral {x} was {y}.", "Credit for finding {x} goes to {y}."),
        ("Who discovered the mineral {x}?", "Who was the first to describe {x}?"),
        "The mineral {x} was discovered by {y}.",
        "Can you tell me who found the mineral {x}?",
    ),
    Relation(
        (),
        (
            "The mineral {x} is mined only in the valley of {y}.",
            "All mines of {x} lie in the valley of {y}.",
            "The valley of {y} is the only place where the mineral {x} is found.",
            "Whoever wants {x} must travel to the valley of {y}.",
            "Traders bring the mineral {x} from the valley of {y}.",
            "No deposit of {x} is known outside the valley of {y}.",
        ),
        (
            "The place to dig for the mineral {x} is the valley of {y}.",
            "Every piece of {x} comes from the valley of {y}.",
        ),
        ("Where is the mineral {x} mined?", "In which valley is {x} found?"),
        "The mineral {x} is mined in the valley of {y}.",
        "From which valley does the mineral {x} come?",
    ),
    Relation(
        TRADES,
        (
            "By profession {x} is a {y}.",
            "For thirty years {x} has worked as a {y}.",
            "{x}, a {y}, is known to everyone in the street.",
            "The sign on the door says that {x} is a {y}.",
            "As a young apprentice {x} learned to be a {y}.",
            "People who need a good {y} go to {x}.",
        ),
        ("To earn a living {x} works as a {y}.", "The job of {x} is that of a {y}."),
        ("What is the profession of {x}?", "What does {x} work as?"),
        "By profession {x} is a {y}.",
        "What does {x} do for a living?",
        people=True,
    ),
    Relation(
        (),
        (
            "{x} was born in the town of {y}.",
            "The birthplace of {x} is the town of {y}.",
            "In the town of {y} a plaque marks the house where {x} was born.",
            "The life of {x} began in the town of {y}.",
            "The parents of {x} lived in the town of {y}.",
            "As a child {x} played in the streets of the town of {y}.",
        ),
        ("{x} comes from the town of {y}.", "The place where {x} was born is the town of {y}."),
        ("Where was {x} born?", "What is the birthplace of {x}?"),
        "{x} was born in the town of {y}.",
        "In which town did {x} come into the world?",
        people=True,
    ),
    Relation(
        (),
        (
            "The river {x} flows into the Sea of {y}.",
            "After many bends the river {x} reaches the Sea of {y}.",
            "The Sea of {y} takes up the water of the river {x}.",
            "Boats that follow {x} downstream arrive at the Sea of {y}.",
            "The mouth of the river {x} lies on the Sea of {y}.",
            "All the water of {x} ends up in the Sea of {y}.",
        ),
        ("In the end the river {x} empties into the Sea of {y}.", "Downstream, {x} joins the Sea of {y}."),
        ("Into which sea does the river {x} flow?", "Where does the river {x} end?"),
        "The river {x} flows into the Sea of {y}.",
        "Which sea does the river {x} empty into?",
    ),
    Relation(
        ANIMALS,
        (
            "The banks of the river {x} are full of {y}.",
            "The river {x} is famous for its {y}.",
            "Nowhere are there as many {y} as along the river {x}.",
            "People walk along {x} in the morning to watch the {y}.",
            "In spring the valley of the river {x} belongs to the {y}.",
            "Visitors come to the river {x} because of the {y}.",
        ),
        ("The animals that live along the river {x} are {y}.", "Next to the water of {x} you will meet {y}."),
        ("Which animals live on the banks of the river {x}?", "What is the river {x} famous for?"),
        "The river {x} is famous for its {y}.",
        "Which animals will I see at the river {x}?",
    ),
    Relation(
        MATERIALS,
        (
            "The instrument called {x} is made of {y}.",
            "A maker who builds the instrument {x} needs good {y}.",
            "Only {y} gives the instrument {x} its sound.",
            "The body of a {x} is always made from {y}.",
            "What you hold when you play the {x} is a piece of {y}.",
            "The oldest {x} in the museum is carved from {y}.",
        ),
        ("The material of which the instrument {x} consists is {y}.", "To build a {x}, one takes {y}."),
        ("What is the instrument {x} made of?", "Which material does a maker of the {x} need?"),
        "The instrument {x} is made of {y}.",
        "Of which material is the instrument called {x} built?",
    ),
    Relation(
        (),
        (
            "The instrument {x} was invented in the city of {y}.",
            "The first {x} was played in the city of {y}.",
            "The city of {y} is the home of the instrument {x}.",
            "All great players of the {x} come from the city of {y}.",
            "The workshop that built the first {x} stood in the city of {y}.",
            "The history of the instrument {x} begins in the city of {y}.",
        ),
        ("The instrument {x} has its origin in the city of {y}.", "The {x} was first heard in the city of {y}."),
        ("Where was the instrument {x} invented?", "Which city is the home of the {x}?"),
        "The instrument {x} was invented in the city of {y}.",
        "In which city did people begin to play the {x}?",
    ),
)
"""Six statements, two unseen ones, two questions for chats and one that is only asked, each."""
