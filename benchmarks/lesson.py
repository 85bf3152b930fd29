"""One lesson with the default settings on the default base: what it gained, how long it took and where the time went.

The text is Python's language reference, which every Python brings along; PATH takes another one. The figures depend on
the machine's speed, because a lesson ends after a minute.

    python -m benchmarks.lesson [PATH] [--seconds 60]
"""

import argparse
import tempfile
from pathlib import Path
from pydoc_data import topics

from benchmarks.common import record
from mlx_impl import readers
from mlx_impl.config import Budget
from mlx_impl.hub import default_model
from mlx_impl.learner import ContinualLearner


def main() -> None:
    """Teach one text into a temporary store and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, help="text to learn  [default: Python's language reference]")
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of the lesson  [default: 60]")
    arguments = parser.parse_args()
    if arguments.path is None:
        text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
        documents, label = [readers.text_document(text, "topics")], "pydoc_data.topics"
    else:
        documents, label = list(readers.read_documents([arguments.path])), arguments.path.name
    with tempfile.TemporaryDirectory() as store:
        learner = ContinualLearner.from_checkpoint(default_model(), store=store)
        lesson = learner.learn(documents, "bench", label, Budget(arguments.seconds)).as_json()
    overhead = 1 - lesson["training_seconds"] / lesson["seconds"]
    record("lesson", {"model": default_model().name, "text": label, **lesson, "share_outside_steps": overhead})


if __name__ == "__main__":
    main()
