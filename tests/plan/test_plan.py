"""What a plan says: counts against the published number, fits and what would make it fit, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vapo.cli import main
from megatron_vapo.config import ActorConfig, Recipe
from megatron_vapo.errors import LayoutError, RecipeError
from megatron_vapo.plan.command import assumptions_of, read_architectures
from megatron_vapo.plan.counts import count_parameters
from megatron_vapo.plan.hardware import GPUS, Assumptions
from megatron_vapo.plan.memory import Cluster, Model, cache_of, engine_weights, phases, roles_of, shortage
from megatron_vapo.plan.search import check_layouts, fewest_nodes, fits, smallest_change
from megatron_vapo.plan.work import batch_of, checkpoint_bytes, reshard_bytes, rollout_seconds, seconds, traffic
from megatron_vapo.recipe.load import load_recipe, with_overrides
from megatron_vapo.weights.architecture import Architecture, read_architecture

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
QWEN_32B = REPOSITORY / "recipes" / "shapes" / "Qwen2.5-32B"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(REPOSITORY / "recipes" / "vapo_32b.yaml", [f"model.path={QWEN_32B}"])


@pytest.fixture(scope="module")
def architectures(recipe: Recipe) -> tuple[Architecture, Architecture | None]:
    from rich.console import Console

    return read_architectures(recipe, Console(quiet=True))


def cluster(nodes: int, gpu: str = "h100-80", **changes: float) -> Cluster:
    return Cluster(GPUS[gpu], nodes, replace(Assumptions(), **changes))


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel": 8, "sequence_parallel": True, "pipeline_parallel": 2},
        {"tensor_parallel": 2, "pipeline_parallel": 4, "first_stage_layers": 13, "last_stage_layers": 15},
        {"pipeline_parallel": 4, "virtual_pipeline": 4, "context_parallel": 2},
    ],
    ids=str,
)
def test_the_ranks_of_qwen2_5_32b_hold_each_published_parameter_once(layout: dict[str, object]) -> None:
    actor = Model("actor", ActorConfig(**layout), read_architecture(QWEN_32B), "bfloat16")
    assert count_parameters(actor) == 32_763_876_352


def test_counts_of_transformers(make_model) -> None:
    """Tied embeddings, experts, a vocabulary that tensor parallelism pads."""
    for family, changes, layout in (
        ("qwen3", {"tie_word_embeddings": True}, {"tensor_parallel": 2, "pipeline_parallel": 2}),
        ("qwen3_moe", {}, {"expert_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True}),
    ):
        model = make_model(family, **changes)
        model.config.architectures = [type(model).__name__]
        distinct = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
        architecture = _architecture_of(model)
        planned = Model("actor", ActorConfig(**layout), architecture, "float32")
        assert count_parameters(planned) == sum(distinct.values())


def _architecture_of(model) -> Architecture:
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return read_architecture(folder)


def test_the_papers_recipe_fits_16_nodes_of_h100(recipe, architectures) -> None:
    models = roles_of(recipe, *architectures)
    paper = cluster(16)
    assert shortage(recipe, models, paper) is None
    training = [use.total for use in phases(recipe, models, paper) if use.phase != "rollout"]
    assert max(training) < 0.75 * paper.budget  # with margin


def test_standing_memory_is_what_megatrons_layout_asks_for(recipe, architectures) -> None:
    """By hand: 16 ranks share a copy; 2 bytes a parameter, 4 a gradient, 12 of optimizer over 8 copies."""
    models = roles_of(recipe, *architectures)
    parts = models["actor"].standing(0, 128)
    layers = 32 * (5120 * 2 * 5120 + 5120 * 2 * 1024 + 3 * 5120 * 27648) / 8 + 152064 * 5120 / 8
    small = 32 * (2 * 5120 + (5120 + 2048) / 8)
    numbers = layers + small
    assert parts["actor parameters"] == 2 * numbers
    assert parts["actor gradients"] == 4 * numbers
    assert parts["actor main parameters"] == pytest.approx(4 * numbers / 8, abs=4)
    assert parts["actor optimizer"] == pytest.approx(8 * numbers / 8, abs=8)


def test_the_engine_holds_an_eighth_of_the_model(recipe, architectures) -> None:
    models = roles_of(recipe, *architectures)
    assert engine_weights(recipe, models["actor"]) == pytest.approx(2 * 32_763_876_352 / 8, rel=0.001)
    rollout = phases(recipe, models, cluster(16))[0]
    cache = cache_of(recipe, models["actor"], rollout, 128)
    assert cache.bytes_per_token == 64 * 2 * 128 * 2  # one key-value head a rank
    assert cache.engines == 16


def test_an_engine_in_fp8_is_half_as_large(recipe, architectures) -> None:
    """By hand: linear layers of a byte a number and 4 a block of 128 x 128; the rest as before; the cache half."""
    in_fp8 = with_overrides(recipe, ["rollout.quantization=fp8", "rollout.sglang.kv_cache=fp8"])
    models = roles_of(in_fp8, *architectures)
    whole = engine_weights(recipe, models["actor"])
    linear = 64 * (5120 * 2 * 5120 + 5120 * 2 * 1024 + 3 * 5120 * 27648) / 8
    assert engine_weights(in_fp8, models["actor"]) == whole - 2 * linear + linear * (1 + 4 / 128**2)
    rollout = phases(in_fp8, models, cluster(16))[0]
    assert cache_of(in_fp8, models["actor"], rollout, 128).bytes_per_token == 64 * 2 * 128


def test_fewer_gpus_do_not_fit_and_the_fewest_nodes_do(recipe, architectures) -> None:
    least = fewest_nodes(recipe, architectures, cluster(1))
    assert least is not None and fits(recipe, architectures, cluster(least))
    assert not any(fits(recipe, architectures, cluster(nodes)) for nodes in range(1, least))


def test_the_smallest_change_makes_it_fit(recipe, architectures) -> None:
    greedy = load_recipe(
        REPOSITORY / "recipes" / "vapo_32b.yaml",
        [f"model.path={QWEN_32B}", "actor.recompute=none", "critic.recompute=none", "actor.pipeline_parallel=1",
         "critic.pipeline_parallel=1"],
    )  # fmt: skip
    sixteen = cluster(16)
    assert not fits(greedy, architectures, sixteen)
    change = smallest_change(greedy, architectures, sixteen)
    assert change == ["actor.recompute=full", "critic.recompute=full"]
    mended = load_recipe(
        REPOSITORY / "recipes" / "vapo_32b.yaml",
        [f"model.path={QWEN_32B}", "actor.pipeline_parallel=1", "critic.pipeline_parallel=1", *change],
    )
    assert fits(mended, architectures, sixteen)


def test_reshard_traffic_is_what_engines_lack(recipe, architectures) -> None:
    """Every engine's rank lacks the half of its shard that the other pipeline stage trains, and nothing else but what
    the layouts cut otherwise: with equal tensor parallelism, only padding of the vocabulary could differ."""
    models = roles_of(recipe, *architectures)
    most, total = reshard_bytes(recipe, models["actor"], cluster(2))
    engine = engine_weights(recipe, models["actor"])
    assert 0.4 * engine < most < 0.6 * engine
    assert total == pytest.approx(16 * engine / 2, rel=0.02)


def test_messages_inside_layers(recipe, architectures) -> None:
    """By hand: each layer of Megatron's sequence parallelism gathers or scatters what goes through it four times
    forwards and six times backwards, and four times more where it is computed again; a rank sends seven eighths of it.
    Context parallelism gathers keys and values of one head, over two nodes where tensor parallelism fills one."""
    tokens = recipe.actor.micro_batch_tokens
    through = tokens * 5120 * 2 * 7 / 8
    step = roles_of(recipe, *architectures)["actor"].step(0)
    assert step.sent == {8: pytest.approx(14 * 32 * through, rel=0.01)}  # embeddings are the hundredth
    assert step.forward_sent == {8: pytest.approx(4 * 32 * through, rel=0.01)}
    faster = ("pipeline_parallel=1", "context_parallel=2", "recompute=none")
    faster = with_overrides(recipe, [f"{role}.{setting}" for role in ("actor", "critic") for setting in faster])
    models = roles_of(faster, *architectures)
    step = models["actor"].step(0)
    assert step.sent == {8: pytest.approx(10 * 64 * through / 2, rel=0.01), 9: 2 * step.forward_sent[9]}
    assert step.forward_sent[9] == 64 * (2 * tokens / 2 * 128 * 2)
    wide = traffic(faster, models, cluster(8, gpus_per_node=16))
    eights = traffic(faster, models, cluster(16))
    assert eights.between_nodes > 0 == wide.between_nodes
    assert eights.inside_layers + eights.between_nodes == pytest.approx(wide.inside_layers)
    cache = cache_of(faster, models["actor"], phases(faster, models, cluster(16))[0], 128)
    found = seconds(faster, models, cluster(16), cache, eights)["inside layers"]
    assert found == pytest.approx(eights.inside_layers / (0.7 * 450e9) + eights.between_nodes / (0.7 * 50e9))


def test_ranks_share_a_checkpoint(recipe, architectures) -> None:
    """14 bytes a parameter in bfloat16, of actor and critic; norms count once a tensor-parallel rank."""
    found = checkpoint_bytes(roles_of(recipe, *architectures), cluster(16))
    total = 14 * (32_763_876_352 + 32_763_876_352 - 152064 * 5120 + 5120)
    assert found.total == pytest.approx(total, rel=1e-3)
    assert total / 128 <= found.written < 1.1 * total / 128  # stages with embeddings have more
    assert found.host == 8 * found.written
    models = roles_of(recipe, *architectures)
    parameters = max(sum(m.standing(s, 128)[f"{n} parameters"] for n, m in models.items()) for s in range(2))
    assert 0.8 * parameters < found.received < parameters


def test_engines_apart_leave_training_its_memory(recipe, architectures) -> None:
    """Four servers of eight GPUs on as many nodes of sixteen: training's part is that of four nodes of eight."""
    apart = with_overrides(recipe, ["rollout.sglang.placement=separate", "rollout.sglang.servers=4"])
    together, beside = cluster(4), replace(cluster(4, gpus_per_node=16), engine_gpus=32)
    assert (beside.gpus, beside.world) == (64, together.world)
    models = roles_of(recipe, *architectures)
    alone = {use.phase: use.parts for use in phases(apart, models, beside)}
    shared = {use.phase: use.parts for use in phases(recipe, models, together)}
    engine = engine_weights(recipe, models["actor"])
    assert alone["rollout"].keys() == {"engine weights", "keys and values"}
    standing = sum(size for name, size in shared["rollout"].items() if name not in alone["rollout"])
    grown = alone["rollout"]["keys and values"] - shared["rollout"]["keys and values"]
    most = 0.8 * GPUS["h100-80"].memory  # SGLang's share; together, what was left of it
    assert sum(alone["rollout"].values()) == pytest.approx(most, abs=2) and grown == pytest.approx(standing, abs=2)
    assert sum(shared["weight_sync"].values()) - sum(alone["weight_sync"].values()) == engine
    for name in ("values", "logprobs", "critic_update", "actor_update"):
        assert alone[name] == shared[name]
    rollout = next(use for use in phases(apart, models, beside) if use.phase == "rollout")
    assert cache_of(apart, models["actor"], rollout, beside.world).engines == 4


def test_engines_apart_are_sent_the_whole_model(recipe, architectures) -> None:
    """By hand: four ranks collect what they lack of it, each of 32 GPUs receives all of it."""
    apart = with_overrides(recipe, ["rollout.sglang.placement=separate", "rollout.sglang.servers=4"])
    beside = replace(cluster(4, gpus_per_node=12), engine_gpus=32)
    model = 2 * 32_763_876_352
    most, total = reshard_bytes(apart, roles_of(recipe, *architectures)["actor"], beside)
    assert most == model
    assert total == pytest.approx(32 * model + 4 * model * 15 / 16, rel=0.01)  # 16 ranks hold a copy


def test_engines_apart_must_be_spread_evenly(recipe, architectures) -> None:
    apart = with_overrides(
        recipe, ["rollout.sglang.placement=separate", "rollout.sglang.servers=2", "rollout.sglang.tensor_parallel=8"]
    )
    models = roles_of(apart, *architectures)
    with pytest.raises(LayoutError, match="as many on each of the 4 nodes"):
        check_layouts(apart, models, replace(cluster(4, gpus_per_node=12), engine_gpus=16))


def test_rollouts_ahead_hide_the_shorter_of_rollout_and_training(recipe, architectures) -> None:
    beside = replace(cluster(4, gpus_per_node=16), engine_gpus=32)
    apart = ["rollout.sglang.placement=separate", "rollout.sglang.servers=4"]
    waiting, ahead = (with_overrides(recipe, [*apart, f"rollout.lag={lag}"]) for lag in (0, 1))
    models = roles_of(recipe, *architectures)
    cache = cache_of(ahead, models["actor"], phases(ahead, models, beside)[0], beside.world)
    one, other = (seconds(r, models, beside, cache, traffic(r, models, beside)) for r in (waiting, ahead))
    rollout, sync = one["rollout"], one["weight sync"]
    assert sum(other.values()) == pytest.approx(sync + max(rollout, sum(one.values()) - rollout - sync))
    in_flight = with_overrides(ahead, ["rollout.lag=2", "rollout.in_flight_weight_updates=true"])
    roomy = replace(cache, tokens=10**9)  # the longest response decides, unless rollouts overlap
    of_one, of_several = (rollout_seconds(r, models["actor"], beside, roomy) for r in (ahead, in_flight))
    share = batch_of(recipe, beside).response_tokens / recipe.rollout.max_response_tokens
    assert share <= of_several / of_one < 1
    together, four = with_overrides(recipe, ["rollout.lag=1"]), cluster(4)  # which take turns at any lag
    assert "done at the same time" not in seconds(together, models, four, cache, traffic(together, models, four))


def test_decoding_is_bound_by_the_longest_response(recipe, architectures) -> None:
    models = roles_of(recipe, *architectures)
    rollout = phases(recipe, models, cluster(16))[0]
    cache = cache_of(recipe, models["actor"], rollout, 128)
    floor = recipe.rollout.max_response_tokens * engine_weights(recipe, models["actor"]) / GPUS["h100-80"].bandwidth
    assert rollout_seconds(recipe, models["actor"], cluster(16), cache) > floor


def test_assumptions_are_checked() -> None:
    assert assumptions_of(["training_efficiency=0.5", "gpus_per_node=4"]).gpus_per_node == 4
    for wrong, words in (("mfu=1", "known are"), ("reserve_gib=much", "not a number"), ("reserve_gib=-1", "above 0")):
        with pytest.raises(RecipeError, match=words):
            assumptions_of([wrong])


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_vapo", "plan", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)


def test_the_command(tmp_path: Path) -> None:
    shape = "model.path=recipes/shapes/Qwen2.5-7B"
    picture = tmp_path / "plan.png"
    result = plan("recipes/vapo_7b.yaml", shape, "--nodes", "4", "--json", "--out", str(picture))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["fits"] and found["world"] == 32 and found["parameters"]["actor"] == 7_615_616_512
    assert picture.stat().st_size > 10_000
    assert sum(found["phases"][0]["parts"].values()) <= found["budget"]


def test_the_command_answers_mistakes_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(REPOSITORY / "recipes" / "vapo_32b.yaml")
    assert main(["plan", recipe, "model.path=nowhere"]) == 4
    assert "no config.json there" in capsys.readouterr().err
    shape = REPOSITORY / "recipes" / "shapes" / "Qwen2.5-32B"
    assert main(["plan", recipe, f"model.path={shape}", "--nodes", "1"]) == 5
    assert "does not divide the 8 processes" in capsys.readouterr().err
