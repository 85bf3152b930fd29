"""The commands of `minimac-mlx`, a module for each theme.

Here is the table of all of them: what `minimac-mlx --help` says of each and which module has it. The group in `cli.py`
imports a command's module when that command is called for, so that --help needs none. Only what makes a command's own
help may be imported at the top of these modules; what the command does is imported inside it.
"""

COMMANDS = {
    "pull": ("models", "Get a base model to start from."),
    "tokenizer": ("models", "Train a tokenizer."),
    "train": ("models", "Train a model."),
    "learn": ("learning", "Teach the model a text."),
    "generate": ("using", "Continue a prompt."),
    "chat": ("using", "Talk with the model, and teach it on the way."),
    "eval": ("using", "Measure how well a text is predicted."),
    "list": ("lessons", "Show what has been learned."),
    "log": ("lessons", "Show the lessons of a domain."),
    "report": ("lessons", "Measure what was learned and what was kept."),
    "undo": ("lessons", "Take a lesson back."),
    "forget": ("lessons", "Erase a domain for good."),
    "prune": ("lessons", "Delete old versions, to save room."),
    "verify": ("lessons", "Check every file of a model and its lessons."),
    "convert": ("exchange", "Turn a model from one format into another."),
    "export": ("exchange", "Write a domain's adapter for other programs."),
    "import": ("exchange", "Take an adapter from other programs in."),
    "doctor": ("machine", "Show how this machine is doing."),
    "bench": ("machine", "Measure speed and memory beside its peers."),
    "demo": ("machine", "See everything once, in a few minutes."),
}
"""Of each command, by name, its module and its line in --help."""
