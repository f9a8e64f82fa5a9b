"""Hypernetwork editors: MEND, MALMEN, RLEdit and HORSE on one base.

net = make_hypernetwork("horse", lm, layers=[4, 5, 6], rank=64, lr=1e-3)
Trainer(lm, net, disjoint(records_of(train_facts), test_facts), {"n_edits": 64}).train(200)
net.save("horse.safetensors")
editor = make_editor("horse", lm, hypernetwork="horse.safetensors")   # editkit.methods
"""

from .cache import EditRows, RowFiles, RowMemory, collect
from .data import EditRecord, disjoint, encode_pairs, records_of
from .horse import HORSE
from .malmen import MALMEN
from .mend import MEND
from .network import METHODS, Hypernetwork, load_hypernetwork, make_hypernetwork
from .rledit import RLEdit
from .solve import RidgeSystem
from .training import TrainConfig, Trainer

__all__ = [
    "HORSE", "MALMEN", "MEND", "METHODS", "EditRecord", "EditRows", "Hypernetwork", "RLEdit", "RidgeSystem",
    "RowFiles", "RowMemory", "TrainConfig", "Trainer", "collect", "disjoint", "encode_pairs", "load_hypernetwork",
    "make_hypernetwork", "records_of",
]  # fmt: skip
