"""The commands, one a file, each with its options: ``Options`` and ``run``."""

RECIPES = {
    "demo": "adapt an embedded model to a new task: two minutes on a CPU",
    "glue": "fine-tune an encoder on a task of GLUE",
    "classify": "fine-tune an encoder on texts and their classes",
    "sft": "fine-tune a decoder on instructions and answers",
    "compare": "methods, learning rates and seeds on one task, in one table",
    "pretrain": "make the embedded model of the demo from scratch",
    "evaluate": "measure a run's adapter again, on its own data or on other",
    "export": "merge an adapter into its base, as a Hugging Face folder",
    "rank": "what rank an adapter's updates have, as a table and a figure",
    "plan": "what would train, and what a step takes on a mesh; reads no weights",
}
