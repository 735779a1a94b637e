"""Task distributions p(T): everything that can be sampled as a batch of (support, query) pairs.

A task family is any object with ``sample(n_tasks, generator) -> Tasks``. Importing this package reads no file and draws
no number; data sets are loaded by the ``load`` functions of their modules."""

from helpers.tasks.batches import merge_support_query, minibatches
from helpers.tasks.episodes import FewShot
from helpers.tasks.functions import Functions
from helpers.tasks.sinusoid import Sinusoids

__all__ = ["FewShot", "Functions", "Sinusoids", "merge_support_query", "minibatches"]
