"""The attacks of an audit, one file per idea."""

from scx.audit.attacks.batch_of_one import BatchOfOne
from scx.audit.attacks.border import BorderMap, BorderTokens, RowOrder
from scx.audit.attacks.collision import Collision
from scx.audit.attacks.dictionary import HeadNorms, SortedValues
from scx.audit.attacks.equality import Equality
from scx.audit.attacks.injection import Injection, InjectionInTheClear
from scx.audit.attacks.inversion import Inversion, LinkedInversion
from scx.audit.attacks.known_plaintext import KnownMap, KnownPrefix, Neighbour
from scx.audit.attacks.linking import Linking
from scx.audit.attacks.many_steps import ManySteps
from scx.audit.attacks.memory import ClearCache, ClearHidden, TokenIds
from scx.audit.attacks.moments import Moments, PerfectMoments
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
    TokenIds(),
    SortedValues(),
    HeadNorms(),
    Inversion(),
    Equality(),
    ManySteps(),
    Moments(),
    PerfectMoments(),
    KnownMap(),
    RowOrder(),
    BorderMap(),
    Linking(),
    LinkedInversion(),
    Subspace(),
    # The searches: each gets an equal part of the time that is left.
    KnownPrefix(),
    Neighbour(),
    Features(),
    ShuffledFeatures(),
    Collision(),
    ClearCache(),
    Injection(),
    InjectionInTheClear(),
    BatchOfOne(),
    BorderTokens(),
    Plain(),
    Shuffled(),
    FeaturesOfQueries(),
    ClearHidden(),
)
"""In the order in which they run: the searches have the time that the fast ones leave."""
