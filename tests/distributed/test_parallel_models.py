"""Test that models train on several ranks as in one process: tensor parallel, FSDP2, and both on a mesh of two dimensions."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from support.parallel_models import (
    assert_trained_as_by_one_process,
    batch,
    blocks,
    linear_on_the_kernel,
    mean_square,
    trained,
    with_fastlm,
)
from support.ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fastlm
from fastlm.testing import seeded_normal

STEPS = 2


def plan(local: bool) -> dict:
    """Return a plan for a block; ``local`` says whether plain tensors or DTensors go between its layers."""
    column_wise = {name: ColwiseParallel(use_local_output=local) for name in ("query", "key", "value", "up")}
    return column_wise | {name: RowwiseParallel() for name in ("out", "down")}


def tensor_parallel(model: nn.Module, mesh, local: bool = True) -> nn.Module:
    for block in model:
        parallelize_module(block, mesh, plan(local))
    return model


def fully_sharded(model: nn.Module, parts, mesh=None) -> nn.Module:
    for part in parts:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def mean_over(group=None):
    """Return the function that makes one loss of those of data-parallel ranks."""

    def mean(loss):
        loss = loss.clone()
        dist.all_reduce(loss, group=group)
        return loss / dist.get_world_size(group)

    return mean


# ---- a block of plain layers ------------------------------------------------------------------------------------------------


def tensor_parallel_blocks(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for local in (True, False):
        model = tensor_parallel(with_fastlm(blocks()), mesh, local)
        with linear_on_the_kernel():
            results = trained(model, mean_square, [batch()] * STEPS)
        assert_trained_as_by_one_process(results, blocks(), mean_square, [batch()] * STEPS)


def test_tensor_parallel():
    run(tensor_parallel_blocks, 2)


def more_ranks_than_key_heads(rank, world):
    """Keys and values are gathered, as plain column-wise layers would cut a head in two."""
    mesh = init_device_mesh("cpu", (world,))
    model = with_fastlm(blocks())
    for block in model:
        whole = {name: ColwiseParallel(output_layouts=Replicate(), use_local_output=False) for name in ("key", "value")}
        parallelize_module(block, mesh, plan(local=False) | whole)
    results = trained(model, mean_square, [batch()] * STEPS)
    assert_trained_as_by_one_process(results, blocks(), mean_square, [batch()] * STEPS)


def test_tensor_parallel_on_more_ranks_than_key_heads():
    run(more_ranks_than_key_heads, 4)


def sequence_parallel_blocks(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    model = with_fastlm(blocks())
    split = {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
    rows = {name: RowwiseParallel(output_layouts=Shard(1), use_local_output=False) for name in ("out", "down")}
    names = ("query", "key", "value", "up")
    columns = {name: ColwiseParallel(input_layouts=Shard(1), use_local_output=False) for name in names}
    for block in model:
        parallelize_module(block, mesh, split | columns | rows)
    first = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False)
    parallelize_module(model, mesh, first)
    results = trained(model, mean_square, [batch()] * STEPS)
    assert_trained_as_by_one_process(results, blocks(), mean_square, [batch()] * STEPS)


def test_sequence_parallel_norms():
    run(sequence_parallel_blocks, 2)


def fully_sharded_blocks(rank, world):
    model = with_fastlm(blocks())
    fully_sharded(model, model)
    mine = batch().chunk(world)[rank]
    with linear_on_the_kernel():
        results = trained(model, mean_square, [mine] * STEPS, mean_over())
    assert_trained_as_by_one_process(results, blocks(), mean_square, [batch()] * STEPS)


@pytest.mark.parametrize("world", [2, 4])
def test_fully_shard(world):
    run(fully_sharded_blocks, world)


def both_on_a_mesh(rank, world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(with_fastlm(blocks()), mesh["tp"], local=False)
    fully_sharded(model, model, mesh["dp"])
    mine = batch().chunk(2)[mesh.get_local_rank("dp")]
    results = trained(model, mean_square, [mine] * STEPS, mean_over(mesh.get_group("dp")))
    assert_trained_as_by_one_process(results, blocks(), mean_square, [batch()] * STEPS)


def test_tensor_parallel_and_fully_shard():
    run(both_on_a_mesh, 4)


def compiled_blocks(rank, world):
    """Compile blocks that are tensor parallel, between which DTensors go, and blocks that are fully sharded."""
    mesh, mine = init_device_mesh("cpu", (world,)), batch().chunk(world)[rank]
    expected = trained(tensor_parallel(with_fastlm(blocks()), mesh, local=False), mean_square, [batch()] * STEPS)
    model = tensor_parallel(with_fastlm(blocks()), mesh, local=False)
    model.compile(backend="aot_eager", fullgraph=True)
    results = trained(model, mean_square, [batch()] * STEPS)
    eager, model = with_fastlm(blocks()), with_fastlm(blocks())
    expected_sharded = trained(fully_sharded(eager, eager), mean_square, [mine] * STEPS)
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    results_sharded = trained(fully_sharded(model, model), mean_square, [mine] * STEPS)
    for name, actual in results.items():
        torch.testing.assert_close(actual, expected[name])
        torch.testing.assert_close(results_sharded[name], expected_sharded[name])


def test_tensor_parallel_and_fully_sharded_blocks_can_be_compiled():
    run(compiled_blocks, 2)


# ---- torch's own layers -----------------------------------------------------------------------------------------------------


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def encoders(rank, world):
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    x = seeded_normal(9, (4, 6, 16), torch.float32)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[1, 4:] = padding[2, 1:] = True

    def loss_of(model, numbered):
        rows = numbered.long()
        out = model(x[rows].to(next(model.parameters()).dtype), src_key_padding_mask=padding[rows])
        return out.masked_fill(padding[rows][..., None], 0.0).square().mean()

    model = with_fastlm(encoder())
    for layer in model.layers:
        if mesh["tp"].size() > 1:
            parallelize_module(layer, mesh["tp"], {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()})
    fully_sharded(model, model.layers, mesh["dp"])
    rows = torch.arange(4).chunk(2)[mesh.get_local_rank("dp")]
    results = trained(model, loss_of, [rows] * STEPS, mean_over(mesh.get_group("dp")))
    assert_trained_as_by_one_process(results, encoder(), loss_of, [torch.arange(4)] * STEPS)


@pytest.mark.parametrize("world", [2, 4])
def test_transformer_encoders(world):
    run(encoders, world)


def attentions_on_dtensors(rank, world):
    """Hold an attention to torch's of plain tensors, as torch's of DTensors takes minutes on a CPU."""
    from torch.distributed.tensor import distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    x, padding = seeded_normal(9, (4, 6, 16), torch.float32), torch.zeros(4, 6, dtype=torch.bool)
    padding[1, 4:] = True
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    expected, _ = theirs(x, x, x, key_padding_mask=padding, need_weights=False)
    expected.square().sum().backward()
    for placement in (Shard(0), Shard(1), Replicate()):
        ours = copy.deepcopy(theirs)
        ours.zero_grad()
        fastlm.replace(ours)
        distribute_module(ours, mesh)
        given = distribute_tensor(x, mesh, [placement], src_data_rank=None)
        mask = distribute_tensor(padding, mesh, [Shard(0)], src_data_rank=None)
        out, _ = ours(given, given, given, key_padding_mask=mask, need_weights=False)
        assert out.placements == (placement,)
        out.square().sum().backward()
        torch.testing.assert_close(out.full_tensor(), expected)
        for actual, parameter in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(actual.grad.full_tensor(), parameter.grad)


def test_multihead_attention_takes_dtensors():
    run(attentions_on_dtensors, 2)


# ---- models of transformers -------------------------------------------------------------------------------------------------

IDS = torch.arange(4 * 13).view(4, 13) * 7 % 60


def language_loss(model, ids):
    return model(ids, labels=ids).loss


def llama(**options):
    from support.transformers_models import ARCHITECTURES

    return ARCHITECTURES["Llama"].build("fastlm", **options).train()


LLAMA_PLAN = {
    **{f"self_attn.{name}_proj": ColwiseParallel for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


def models_of_transformers(rank, world, folder):
    """Importing transformers takes each rank seconds, so that one run has all models."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))  # as torchrun does
    import transformers
    from support.transformers_models import ARCHITECTURES
    from transformers.distributed import DistributedConfig

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = with_fastlm(llama())
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], {name: style() for name, style in LLAMA_PLAN.items()})
    fully_sharded(model, model.model.layers, mesh["dp"])
    rows = IDS.chunk(2)[mesh.get_local_rank("dp")]
    results = trained(model, language_loss, [rows] * STEPS, mean_over(mesh.get_group("dp")))
    assert_trained_as_by_one_process(results, llama(), language_loss, [IDS] * STEPS)

    model, gpt2 = (ARCHITECTURES["GPT-2"].build("fastlm").train() for _ in range(2))
    with_fastlm(model)
    fully_sharded(model, model.transformer.h)
    results = trained(model, language_loss, [IDS.chunk(world)[rank]] * STEPS, mean_over())
    assert_trained_as_by_one_process(results, gpt2, language_loss, [IDS] * STEPS)

    options = {"attn_implementation": "fastlm", "distributed_config": DistributedConfig(tp_plan="auto", tp_size=world)}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).train()
    fastlm.replace(model)  # leaves the linear layers, whose forward transformers has replaced
    results = trained(model, language_loss, [IDS] * STEPS)
    assert_trained_as_by_one_process(results, llama(num_key_value_heads=4), language_loss, [IDS] * STEPS)


def test_models_of_transformers(tmp_path):
    """Train a Llama both ways at once, a GPT-2 fully sharded, and a Llama by transformers' own plan."""
    pytest.importorskip("transformers.distributed")
    llama(num_key_value_heads=4).save_pretrained(tmp_path)
    run(models_of_transformers, 4, str(tmp_path))
