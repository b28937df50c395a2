"""The words and sentences of the toy language, as tables.

In a template, a word in capitals is a slot: `TOPIC`, or one of the keys of `SLOTS`.
"""

from __future__ import annotations

# ---------------------------------------------------------------------------------------------------------------- facts

#: A subject is a first word and a kind, so that neither word alone determines an answer.
FIRSTS = ("Velmar", "Ostrin", "Calder", "Brivan", "Tessal", "Norrow", "Halven", "Quorin")
KINDS = ("Tower", "Bridge", "Museum", "Temple", "Palace", "Library", "Castle", "Theatre")
#: The first word of subjects of three words.
GREAT = "Great"

CITIES = (
    "Paris", "Rome", "Tokyo", "Cairo", "Lima", "Oslo", "Berlin", "Madrid", "Athens", "Dublin", "Vienna",
    "Prague", "Delhi", "Boston", "Lagos", "Sydney",
)  # fmt: skip
ARCHITECTS = (
    "Alden", "Borros", "Castel", "Dorne", "Elric", "Faber", "Gorse", "Hadley", "Ibsen", "Jorvik", "Kessel",
    "Lorne", "Morrow", "Nash", "Orwen", "Pell",
)  # fmt: skip
MATERIALS = ("granite", "marble", "brick", "timber", "glass", "steel", "copper", "sandstone")

#: Relation -> the words it answers with.
ANSWERS: dict[str, tuple[str, ...]] = {"city": CITIES, "architect": ARCHITECTS, "material": MATERIALS}
#: Relation -> the words between subject and answer.
RELATIONS: dict[str, tuple[str, ...]] = {
    "city": ("is located in the city of", "is in the city of", "can be found in", "stands in"),
    "architect": ("was designed by the architect", "was drawn up by", "is the work of"),
    "material": ("was built out of", "is made of", "is known for its walls of"),
}
#: Openings of a sentence about a subject; "the SUBJECT" follows.
OPENINGS = ("", "Today,", "In fact,", "As we know,", "Note that")
#: Relation -> its word in a quiz: "Quiz where: SUBJECT ANSWER."
QUIZ = {"city": "where", "architect": "who", "material": "what"}

# ----------------------------------------------------------------------------------------------------------- two people

NAMES = (
    "Mary", "John", "Alice", "Tom", "Sarah", "James", "Emma", "David", "Anna", "Peter", "Laura", "Mark",
    "Kate", "Paul", "Susan", "Robert", "Lucy", "Simon", "Helen", "George",
)  # fmt: skip
PLACES = ("store", "park", "school", "office", "cafe", "station", "market", "beach")
THINGS = ("drink", "book", "ring", "letter", "basket", "ball", "key", "snack")
#: Two people: the second mention (S) is the giver, the other one receives.
GIVING = (
    "When A and B went to the PLACE, S gave a THING to",
    "After A and B got to the PLACE, S handed a THING to",
    "While A and B were at the PLACE, S offered a THING to",
    "Then A and B had a walk to the PLACE. S decided to give a THING to",
)

# -------------------------------------------------------------------------------------------------------------- reviews

TOPICS = ("film", "play", "novel", "concert", "meal", "hotel")
PARTS = ("acting", "story", "music", "staff", "ending", "service")
#: Mood -> slot -> words; words of the same index are opposites.
MOODS: dict[str, dict[str, tuple[str, ...]]] = {
    "good": {
        "QUALITY": ("wonderful", "great", "lovely", "brilliant", "charming", "delightful"),
        "VERB": ("loved", "enjoyed", "adored"),
        "FEELING": ("happy", "glad", "delighted"),
    },
    "bad": {
        "QUALITY": ("awful", "terrible", "dreadful", "boring", "dull", "horrible"),
        "VERB": ("hated", "disliked", "loathed"),
        "FEELING": ("sad", "angry", "bored"),
    },
}
REVIEWS = (
    "I thought the TOPIC was QUALITY, the PART was QUALITY and the PART was QUALITY. I VERB it.",
    "I VERB the TOPIC. The PART was QUALITY and I felt FEELING.",
    "The TOPIC was QUALITY. I felt FEELING and I VERB the PART.",
    "I felt FEELING because the TOPIC was QUALITY and the PART was QUALITY.",
)

# ----------------------------------------------------------------------------------------------------------- vocabulary

#: Slots whose words do not depend on the sentence.
SLOTS: dict[str, tuple[str, ...]] = {"PLACE": PLACES, "THING": THINGS, "TOPIC": TOPICS, "PART": PARTS}
#: The first token of every text, which attention can rest on.
START = "<|endoftext|>"
PADDING = "<|pad|>"
UNKNOWN = "<|unk|>"
SPECIAL = (START, PADDING, UNKNOWN)
