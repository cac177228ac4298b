"""The attacks of an audit, one file an idea."""

from scx.audit.attacks.batch_of_one import BatchOfOne
from scx.audit.attacks.collision import Collision
from scx.audit.attacks.dictionary import HeadNorms, SortedValues
from scx.audit.attacks.equality import Equality
from scx.audit.attacks.injection import Injection, InjectionInTheClear
from scx.audit.attacks.inversion import Inversion, LinkedInversion
from scx.audit.attacks.known_plaintext import KnownPrefix, Neighbour
from scx.audit.attacks.linking import Linking
from scx.audit.attacks.many_steps import ManySteps
from scx.audit.attacks.memory import ClearCache, ClearHidden, TokenIds
from scx.audit.attacks.moments import Moments
from scx.audit.attacks.subspace import Subspace
from scx.audit.attacks.vocabulary import (
    Features,
    FeaturesOfQueries,
    Plain,
    Shuffled,
    ShuffledFeatures,
)
from scx.audit.interface import Attack

ATTACKS: tuple[Attack, ...] = (
    # A1, fast ones first: what they leave of the time is for the searches.
    SortedValues(),
    HeadNorms(),
    Inversion(),
    Equality(),
    ManySteps(),
    Moments(),
    KnownPrefix(),
    Neighbour(),
    Features(),
    ShuffledFeatures(),
    Collision(),
    ClearCache(),
    Injection(),
    InjectionInTheClear(),
    Linking(),
    LinkedInversion(),
    Subspace(),
    BatchOfOne(),
    Plain(),
    Shuffled(),
    FeaturesOfQueries(),
    TokenIds(),
    ClearHidden(),
)
"""In the order in which they run and are reported."""
