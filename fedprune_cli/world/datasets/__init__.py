"""Datasets: what they are, and the table of those that can be chosen."""

from fedprune_cli.world.datasets.arrays import Arrays
from fedprune_cli.world.datasets.dataset import Dataset, DatasetConfig
from fedprune_cli.world.datasets.downloaded import Cifar10, Cifar100, Emnist, FashionMnist, Mnist, Svhn
from fedprune_cli.world.datasets.embedded import Digits, Patches
from fedprune_cli.world.datasets.images import Folder
from fedprune_cli.world.datasets.keel import Letter, Optdigits, Satimage
from fedprune_cli.world.datasets.roster import Roster
from fedprune_cli.world.datasets.shakespeare import Shakespeare
from fedprune_cli.world.datasets.shuttle import Shuttle
from fedprune_cli.world.datasets.table import Table
from fedprune_cli.world.datasets.watch import Watch
from fedprune_cli.world.datasets.windows import Windows

__all__ = ["DATASETS", "Dataset", "DatasetConfig"]

DATASETS: dict[str, type[DatasetConfig]] = {
    "digits": Digits,
    "patches": Patches,
    "fmnist": FashionMnist,
    "mnist": Mnist,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "emnist": Emnist,
    "svhn": Svhn,
    "watch": Watch,
    "shakespeare": Shakespeare,
    "optdigits": Optdigits,
    "letter": Letter,
    "satimage": Satimage,
    "shuttle": Shuttle,
    "folder": Folder,
    "arrays": Arrays,
    "table": Table,
    "windows": Windows,
    "nodes": Roster,
}
