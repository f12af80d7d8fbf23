"""Records torch_prune.json: the masks of torch.nn.utils.prune on weights with many equal magnitudes.

Run with Debian's python3-torch: /usr/bin/python3 torch_prune.py > torch_prune.json
"""

import json

import torch
from torch import nn
from torch.nn.utils import prune


def weights(seed, length, levels):
    state, values = seed, []
    for _ in range(length):
        state = (state * 1664525 + 1013904223) % 2**32
        level = (state >> 16) % levels + 1
        values.append(level / 8 * (-1 if state & 0x8000 else 1))
    return values


class Holder(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values))


def kept(values, lengths, amount):
    holders, start = [], 0
    for length in lengths:
        holders.append(Holder(values[start : start + length]))
        start += length
    parameters = [(holder, "weight") for holder in holders]
    if len(lengths) == 1:
        prune.l1_unstructured(holders[0], "weight", amount=amount)
    else:
        prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=amount)
    mask = torch.cat([holder.weight_mask for holder in holders]).int().tolist()
    nibbles = [mask[index : index + 4] for index in range(0, len(mask), 4)]
    return "".join(f"{sum(bit << place for place, bit in enumerate(nibble)):x}" for nibble in nibbles)


cases, seed = [], 0
for lengths in ([5], [64], [7, 3], [300], [100, 250, 31], [1500, 700]):
    for levels in (1, 3, 40):
        for order in ("random", "ascending", "descending"):
            for amount in (0.01, 0.3, 0.5, 0.9):
                if sum(lengths) < 100 and amount == 0.01:
                    continue
                if sum(lengths) > 1000 and (amount == 0.9 or levels == 1):
                    continue
                seed += 1
                values = weights(seed, sum(lengths), levels)
                if order == "ascending":
                    values.sort(key=abs)
                elif order == "descending":
                    values.sort(key=lambda value: -abs(value))
                case = {"seed": seed, "lengths": lengths, "levels": levels, "order": order, "amount": amount}
                cases.append(case | {"kept": kept(values, lengths, amount)})
print("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]")
