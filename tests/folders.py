"""Checkpoint folders as their authors write them. Shared by the tests of layouts."""

import json

import torch
from safetensors.torch import save_file


def write_folder(folder, config, tensors, num_shards=1, pickled=False):
    """config.json and the weights: one file, or shards with their index; tensors go to shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    write = torch.save if pickled else save_file
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if num_shards == 1:
        write(tensors, folder / f"{stem}.{suffix}")
        return folder
    places = {}
    for shard in range(num_shards):
        held = dict(list(tensors.items())[shard::num_shards])
        file = f"{stem}-{shard + 1:05}-of-{num_shards:05}.{suffix}"
        write(held, folder / file)
        places |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder
