"""Every attack on a planted case where the answer is known, and where it must fail.

The engine is simulated (tests/audit_world.py) on a random model of 512 tokens, so
that chance is 0.2 % of tokens, or the most common one: a share below 10 % is as
good as nothing, and one above 95 % as good as all.
"""

import dataclasses

import pytest
import torch

from lab.tiny_models import VOCABULARY
from scx import keys
from scx.audit.attacks import (
    ATTACKS,
    BatchOfOne,
    BorderMap,
    BorderTokens,
    ClearCache,
    ClearHidden,
    Collision,
    Equality,
    Features,
    FeaturesOfQueries,
    HeadNorms,
    Injection,
    InjectionInTheClear,
    Inversion,
    KnownMap,
    KnownPrefix,
    LinkedInversion,
    Linking,
    ManySteps,
    Moments,
    Neighbour,
    PerfectMoments,
    Plain,
    RowOrder,
    Shuffled,
    ShuffledFeatures,
    SortedValues,
    Subspace,
    TokenIds,
)
from scx.audit.attacks.many_steps import profiles
from scx.audit.attacks.subspace import members
from scx.audit.interface import About, Budget, Claim, Plaintext
from scx.audit.matching import Reading, assign, search
from scx.audit.public_model import PublicModel
from scx.audit.scoring import Truth, score
from scx.audit.views import fresh_random, view_of
from tests import audit_world

ALL, NOTHING = 0.95, 0.1
LENGTHS = (6, 9, 70)
LONG = (130, 140)
"""For what needs more rows than a head has features, and a rest to read."""
NEED_LONG = KnownPrefix | KnownMap | Moments | RowOrder | BorderMap | BorderTokens
ENCODED = (0, 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def public(tiny_llama):
    return PublicModel(str(tiny_llama))


@pytest.fixture(scope="session")
def wrong(tiny_llama):
    return PublicModel(str(tiny_llama), torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def recorded(public):
    """What an engine would hold of random texts under a codec."""
    made = {}

    def get(codec, lengths=LENGTHS):
        if (codec, lengths) not in made:
            generator = torch.Generator().manual_seed(7)
            texts = [
                torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths
            ]
            make = getattr(audit_world, codec)
            made[codec, lengths] = audit_world.capture(public, texts, ENCODED, make)
        return made[codec, lengths]

    return get


@pytest.fixture
def attacked(public, wrong, recorded):
    """The score by label of an attack on a layer that a codec encodes."""
    generator = torch.Generator().manual_seed(8)
    text = torch.randint(VOCABULARY, (2048,), generator=generator)

    def run(attack, codec, layer, control="", seconds=60.0, candidates=None):
        long = isinstance(attack, NEED_LONG)
        capture = recorded(codec, LONG if long else LENGTHS)
        view = view_of(capture, layer, attack.adversary)
        if control == "random":
            view = fresh_random(view, torch.Generator().manual_seed(9))
        model = wrong if control == "wrong weights" else public
        knowledge = audit_world.knowledge(model, layer, capture, text)
        outcome = attack.run(knowledge, view, Budget(seconds, candidates))
        truth = Truth(capture, layer, VOCABULARY)
        return {label: score(claims, truth) for label, claims in outcome.claims.items()}

    return run


def first(scores):
    return next(iter(scores.values()))


class PatientCollision(Collision):
    """Tries all tokens: the random model's order of them says nothing."""

    tried = 1.0


PLANTED = [
    (SortedValues(), "permutation", 0),
    (HeadNorms(), "permutation", 0),
    (Inversion(), "clear", 0),
    (LinkedInversion(), "permutation", 0),
    (Equality(), "permutation", 0),
    (Equality(), "affine", 0),
    (KnownPrefix(), "permutation", 0),
    (Neighbour(), "permutation", 0),
    (Neighbour(), "permutation", 2),
    (Neighbour(), "affine", 0),
    (Neighbour(), "affine", 2),
    (Features(), "permutation", 0),
    (Features(), "permutation", 2),
    (ShuffledFeatures(), "permutation", 0),
    (ShuffledFeatures(), "permutation", 2),
    (PatientCollision(), "permutation", 0),
    (PatientCollision(), "permutation", 2),
    (ClearCache(), "affine", 0),
    (ClearHidden(), "affine", 0),
    (KnownMap(), "permutation", 2),
    (KnownMap(), "affine", 2),
    (RowOrder(), "permutation", 0),
    (RowOrder(), "permutation", 2),
    (RowOrder(), "affine", 0),
    (RowOrder(), "affine", 2),
    (BorderMap(), "permutation", 0),
    (BorderMap(), "permutation", 2),
    (BorderMap(), "affine", 0),
    (BorderMap(), "affine", 2),
    (BorderTokens(), "permutation", 0),
    (BorderTokens(), "affine", 0),
    (BorderTokens(), "affine", 2),
    (Linking(), "permutation", 0),
    (Linking(), "permutation", 2),
    (Subspace(), "affine", 0),
    (BatchOfOne(), "affine", 0),
    (BatchOfOne(), "affine", 2),
    (Plain(), "affine", 0),
    (Plain(), "affine", 2),
    (Shuffled(), "affine", 0),
    (Shuffled(), "affine", 2),
    (FeaturesOfQueries(), "permutation", 0),
    (FeaturesOfQueries(), "permutation", 2),
    (TokenIds(), "affine", 0),
]
FAILS = [
    (SortedValues(), "affine", 0),
    (HeadNorms(), "affine", 0),
    (Inversion(), "permutation", 0),
    (Inversion(), "affine", 0),
    (Inversion(), "clear", 2),
    (LinkedInversion(), "affine", 0),
    (Equality(), "permutation", 2),
    (ManySteps(), "affine", 0),
    (Features(), "affine", 0),
    (Features(), "affine", 2),
    (ShuffledFeatures(), "affine", 2),
    (PatientCollision(), "affine", 0),
    (PatientCollision(), "affine", 2),
    (FeaturesOfQueries(), "affine", 0),
    (Linking(), "affine", 0),
    (Linking(), "affine", 2),
]


def name(value):
    return getattr(value, "name", str(value))


@pytest.mark.parametrize(("attack", "codec", "layer"), PLANTED, ids=name)
def test_an_attack_finds_what_is_planted(attack, codec, layer, attacked):
    scores = attacked(attack, codec, layer)
    found = first(scores)
    assert found.share > ALL
    assert found.attacked > 0
    if isinstance(attack, Linking):
        assert all(part.share > ALL for part in scores.values())


@pytest.mark.parametrize(("attack", "codec", "layer"), FAILS, ids=name)
def test_an_attack_fails_where_the_codec_stands(attack, codec, layer, attacked):
    found = first(attacked(attack, codec, layer, seconds=5, candidates=128))
    assert found.share < NOTHING
    assert found.attacked > 0


CONTROLS = [a for a in ATTACKS if not isinstance(a, TokenIds | Injection | Moments)]


@pytest.mark.parametrize("layer", ENCODED)
@pytest.mark.parametrize("attack", CONTROLS, ids=name)
def test_random_tensors_give_nothing(attack, layer, attacked):
    if attack.scope == "layer 0" and layer:
        pytest.skip("an attack on layer 0")
    scores = attacked(attack, "permutation", layer, "random", 2, candidates=64)
    assert all(s.share < s.floor + NOTHING for s in scores.values())


@pytest.mark.parametrize("layer", ENCODED)
@pytest.mark.parametrize("attack", [a for a in CONTROLS if a.uses_weights], ids=name)
def test_other_weights_give_nothing(attack, layer, attacked):
    if attack.scope == "layer 0" and layer:
        pytest.skip("an attack on layer 0")
    scores = attacked(attack, "permutation", layer, "wrong weights", 2, candidates=64)
    assert all(s.share < s.floor + NOTHING for s in scores.values())


def test_a_known_prefix_reads_the_rest_the_better_the_longer_it_is(attacked):
    scores = attacked(KnownPrefix(), "affine", 0)
    curve = {int(label.split()[0]): s.share for label, s in scores.items()}
    assert curve[0] < NOTHING
    assert curve[0] < curve[8] < curve[16] + 1e-9
    assert curve[64] > ALL


def test_a_known_prefix_in_a_deeper_layer(attacked):
    assert attacked(KnownPrefix(), "affine", 2)["128 tokens"].share > ALL


GIVEN = [(KnownPrefix(), 64, 64), (KnownMap(), 128, 0), (Neighbour(), max(LONG), 0)]


@pytest.mark.parametrize(("attack", "of_longest", "of_others"), GIVEN, ids=name)
def test_no_more_of_the_text_is_used_than_the_attack_is_given(
    attack, of_longest, of_others, public, recorded
):
    capture = recorded("affine", LONG)
    view = view_of(capture, 0, "A1")
    given = audit_world.knowledge(public, 0, capture, torch.arange(100))
    changed = []
    for ids in (capture.ids(r) for r in range(len(LONG))):
        known = of_longest if len(ids) == max(LONG) else of_others
        changed.append(torch.cat([ids[:known], (ids[known:] + 1) % VOCABULARY]))
    other = dataclasses.replace(given, plaintext=Plaintext(changed))
    one, two = (attack.run(k, view, Budget(60)).claims for k in (given, other))
    assert one
    for label, claims in one.items():
        for a, b in zip(claims, two[label], strict=True):
            assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("codec", keys.CODECS)
def test_moments_of_the_very_text_read_it(codec, attacked):
    # 270 rows in 64 dimensions: the mean and covariance must be those of the text.
    assert first(attacked(PerfectMoments(), codec, 0)).share > ALL
    assert first(attacked(Moments(), codec, 0)).share < 0.5
    for attack in (Moments(), PerfectMoments()):
        assert first(attacked(attack, codec, 0, "random")).share < NOTHING


def test_features_of_unlike_distribution_are_paired():
    generator = torch.Generator().manual_seed(0)
    scales = 1.1 ** torch.arange(32)
    key = torch.randperm(32, generator=generator)
    seen = torch.randn(4096, 1, 32, generator=generator) * scales
    other = torch.randn(4096, 1, 32, generator=generator) * scales
    gaps = torch.cdist(profiles(seen[..., key])[0], profiles(other)[0], p=1)
    assert (assign(gaps) == key).float().mean() > ALL
    same = torch.cdist(
        profiles((seen / scales)[..., key])[0], profiles(other / scales)[0], p=1
    )
    assert (assign(same) == key).float().mean() < 0.2


def test_pairs_are_the_best_together_and_not_one_by_one():
    # The least gap first would take 1 and be left with 9.
    gaps = torch.tensor([[1.0, 2.0], [3.0, 9.0]])
    assert assign(gaps).tolist() == [1, 0]


@pytest.mark.parametrize("decoys", [8, 32])
def test_mixing_rows_with_decoys_does_not_hide_them(decoys, public):
    generator = torch.Generator().manual_seed(0)
    table = public.layer(0).table
    chosen = torch.randperm(VOCABULARY, generator=generator)[:16]
    noise = torch.randn(decoys, table.shape[1], generator=generator)
    rows = torch.cat([table[chosen], noise])
    mixed = torch.randn(len(rows), len(rows), generator=generator) @ rows
    assert members(mixed, table).tolist() == sorted(chosen.tolist())
    assert not len(members(torch.randn(mixed.shape, generator=generator), table))


def test_injection_loads_the_cache_into_the_public_model(public, recorded, monkeypatch):
    class Tokenizer:
        chat_template = None

        def encode(self, text, add_special_tokens):
            return [3, 1, 4]

    monkeypatch.setitem(vars(public), "tokenizer", Tokenizer())

    def repeated(attack, codec):
        capture = recorded(codec)
        given = audit_world.knowledge(public, 0, capture, torch.arange(100))
        outcome = attack.run(given, view_of(capture, 0, "A1"), Budget(60))
        return {claim.index: claim.values for claim in outcome.claims[""]}

    for attack in (Injection(), InjectionInTheClear()):
        plain = repeated(attack, "clear")
        for request, tokens in plain.items():
            ids = recorded("clear").ids(request)
            prompt = torch.cat([ids, torch.tensor([3, 1, 4])])
            whole = public.causal.generate(
                prompt[None],
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=len(tokens),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :]
            assert torch.equal(tokens, whole)
    encoded = repeated(Injection(), "permutation")
    assert all(not torch.equal(encoded[r], tokens) for r, tokens in plain.items())


def test_nothing_lies_in_the_clear_where_every_layer_is_encoded(public):
    text = torch.arange(40) * 7 % VOCABULARY
    everywhere = range(public.causal.config.num_hidden_layers)
    capture = audit_world.capture(
        public, [text, text[:20]], everywhere, audit_world.permutation
    )
    given = audit_world.knowledge(public, 0, capture, text)
    for attack in (ClearCache(), ClearHidden()):
        view = view_of(capture, 0, attack.adversary)
        assert attack.run(given, view, Budget(60)).claims == {}


def test_an_adversary_sees_no_more_than_its_own(recorded):
    capture = recorded("permutation")
    views = {who: view_of(capture, 0, who) for who in ("A1", "A2", "A3")}
    assert not views["A1"].steps
    for who in ("A1", "A2"):
        assert not views[who].clear_hidden
        assert not views[who].input_ids
    assert set(views["A3"].clear_hidden) == {1, 3}
    assert len(views["A2"].steps) == 3 * len(LENGTHS) + 1


def test_a_search_compares_as_if_with_the_whole_vocabulary(public):
    model = public.layer(2)
    ids = torch.arange(10) * 31 % VOCABULARY
    reading = Reading(lambda states: states.v.flatten(1), model.trace(ids).v.flatten(1))
    assert torch.equal(search(model, reading, ids[:0], Budget(60)), ids)
    for position in range(len(ids)):
        blocks = list(model.candidates(ids[:position].tolist()))
        tokens = torch.cat([block for block, _ in blocks])
        assert sorted(tokens.tolist()) == list(range(VOCABULARY))
        features = torch.cat([reading.features(states) for _, states in blocks])
        gaps = torch.cdist(features, reading.target[position : position + 1], p=1)
        assert tokens[gaps.argmin()] == ids[position]


def test_a_spent_budget_is_reported_as_cut(public, recorded):
    capture = recorded("permutation")
    given = audit_world.knowledge(public, 2, capture, torch.arange(100))
    outcome = Features().run(given, view_of(capture, 2, "A1"), Budget(0))
    assert outcome.cut == f"0 of {sum(LENGTHS)} tokens"
    assert not outcome.claims[""]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attack", [RowOrder(), BorderMap()], ids=name)
def test_the_border_gives_the_key_in_sixteen_bits_too(attack, dtype, public, recorded):
    capture = rounded(recorded("affine", LONG), dtype)
    given = audit_world.knowledge(public, 2, capture, torch.arange(100))
    outcome = attack.run(given, view_of(capture, 2, "A2"), Budget(60))
    found = score(outcome.claims[""], Truth(capture, 2, VOCABULARY))
    assert found.share > ALL


def rounded(capture, dtype):
    """A capture whose engine holds every tensor in `dtype`."""

    def step(whole):
        kept = {name: getattr(whole, name) for name in ("hidden", "k", "v")}
        return dataclasses.replace(
            whole,
            **{n: {i: x.to(dtype) for i, x in by.items()} for n, by in kept.items()},
            border={
                i: type(border)(**{n: x.to(dtype) for n, x in vars(border).items()})
                for i, border in whole.border.items()
            },
        )

    return dataclasses.replace(
        capture,
        alone=[[step(s) for s in steps] for steps in capture.alone],
        together=[step(s) for s in capture.together],
    )


CLAIMS = [
    (About.REQUEST_TOKENS, lambda ids: ids, 1.0),
    (About.REQUEST_TOKENS, lambda ids: torch.cat([ids[:3], ids[3:] + 1]), 0.5),
    (About.CACHE_BAG, lambda ids: ids.flip(0), 1.0),
    (About.TEXT, lambda ids: ids[::2], 0.5),
    (About.EQUALITY, torch.zeros_like, 1 / 15),
]


@pytest.mark.parametrize(("about", "values", "share"), CLAIMS)
def test_the_scorer_counts(about, values, share, public):
    ids = torch.tensor([5, 6, 5, 7, 8, 9])
    capture = audit_world.capture(public, [ids], [0], audit_world.permutation)
    truth = Truth(capture, 0, VOCABULARY)
    assert score([Claim(about, 0, values(ids))], truth).share == pytest.approx(share)
    assert score([], truth).attacked == 0


def test_the_scorer_measures_decoded_vectors(public):
    ids = torch.arange(40) * 7 % VOCABULARY
    capture = audit_world.capture(public, [ids], [0], audit_world.permutation)
    truth = Truth(capture, 0, VOCABULARY)
    model = public.layer(0)
    weight, bias = model.keys_and_values()
    true = (model.trace(ids).hidden @ weight.T + bias).unflatten(-1, (-1, 64))
    spread = (true - true.mean(0)).square().sum(-1).mean(0).sqrt()
    direction = torch.nn.functional.normalize(torch.randn(true.shape), dim=-1)
    for error, share in ((0.0, 1), (0.05, 1), (0.2, 0)):
        values = true + error * spread[:, None] * direction
        found = score([Claim(About.VECTORS, 0, values[8:], 8)], truth)
        assert found.share == share
        assert found.error == pytest.approx(error, abs=1e-5)
        assert found.attacked == true[8:, :, 0].numel()
        assert found.of == true[..., 0].numel()
    blind = true.mean(0).expand_as(true)
    assert score([Claim(About.VECTORS, 0, blind)], truth).share < NOTHING


def test_tokens_that_were_given_count_as_chance(public):
    ids = torch.tensor([5, 6, 5, 7, 8, 9])
    capture = audit_world.capture(public, [ids], [0], audit_world.permutation)
    claim = Claim(About.REQUEST_TOKENS, 0, ids[2:], first=2, given=ids[:2])
    assert score([claim], Truth(capture, 0, VOCABULARY)).floor == pytest.approx(
        max(2 / 6, 1 / 4)
    )
