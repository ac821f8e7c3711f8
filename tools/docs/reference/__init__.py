"""The reference, generated from what the code declares: nothing in it is written by hand."""

from docs.reference.command_line import command_line
from docs.reference.errors import error_classes
from docs.reference.options import config_fields
from docs.reference.passes import passes
from docs.reference.public_names import overview, public_names
from docs.reference.rules import rules
from docs.staging import Stage

__all__ = ["write_reference"]


def write_reference(stage: Stage) -> None:
    """Write the generated pages."""
    stage.add_reference("reference/options", "Options", config_fields(), "every field of a config")
    stage.add_reference("reference/passes", "Passes", passes(), "what is rewritten, sources, options")
    stage.add_reference("reference/rules", "Rules", rules(), "what happens to weights in training")
    stage.add_reference("reference/errors", "Errors", error_classes(), "what each means and what to do")
    stage.add_reference("reference/command_line", "Command line", command_line(), "each with its options")
    pages = public_names()
    stage.add_reference("reference/public_names", "Public names", overview(pages), "what a program imports")
    for module, text in pages.items():
        stage.add_reference(f"reference/{module}", module, text)
