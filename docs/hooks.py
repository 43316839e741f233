"""What MkDocs does not do by itself: sections of other files, output of commands, formulas.

All three stay readable where the pages are shown as they are, without this.
"""

import contextlib
import html
import io
import json
import os
import posixpath
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from latex2mathml.converter import convert as to_mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# A link to a file beside docs/ in a paragraph of its own: the file, or one section of it.
INCLUDE = re.compile(r"^\[[^\]]*\]\(\.\./(?P<file>\w+\.md)(?:#(?P<section>[\w-]+))?\)$", re.M)
# A block that holds one `lip-jax` command and nothing else: the command, and what it prints.
COMMAND = re.compile(r"^```console\n\$ lip-jax (?P<arguments>[^\n]*)\n```$", re.M)
EVERY_COMMAND = "```console\n$ lip-jax COMMAND --help\n```"
TABLES = "```console\n$ lip-jax tables --markdown\n```"
NOTEBOOKS = "[colab](../colab/)"
# Files and folders beside docs/ that have a page of their own.
PAGES = {
  "README.md": "index.md",
  "CHANGELOG.md": "changelog.md",
  "CONTRIBUTING.md": "contributing.md",
  "colab/": "notebooks.md",
}
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
COLUMNS = "80"


def on_files(files: Files, config: MkDocsConfig, **_) -> Files:
  """Adds the notebooks, which lie beside docs/."""
  for path in (ROOT / "colab").glob("*.ipynb"):
    files.append(File.generated(config, f"colab/{path.name}", abs_src_path=str(path)))
  return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
  """Fills in included sections and the output of commands."""
  markdown = INCLUDE.sub(lambda match: _section(page, **match.groupdict()), markdown)
  for mark, fill in ((NOTEBOOKS, _notebooks), (TABLES, _tables), (EVERY_COMMAND, _every_command)):
    if mark in markdown:
      markdown = markdown.replace(mark, "\n\n".join(fill()))
  return COMMAND.sub(lambda match: _run(match["arguments"]), markdown)


def on_page_content(content: str, **_) -> str:
  """Formulas as MathML, which browsers draw without scripts; source code, where shown, unfolded."""

  def formula(match: re.Match) -> str:
    display = "block" if match[1] == "div" else "inline"
    return to_mathml(html.unescape(match[2]).strip(), display=display)

  content = content.replace('<details class="mkdocstrings-source">', "<details open>")
  return FORMULA.sub(formula, content)


def on_serve(server, config: MkDocsConfig, **_):
  """Watches the files that pages include."""
  for name in PAGES:
    if (ROOT / name).exists():
      server.watch(str(ROOT / name))
  return server


def _section(page: Page, file: str, section: str | None) -> str:
  """A file beside docs/ without its title, or one section of it, with links as from `page`."""
  text = (ROOT / file).read_text()
  lines, wanted, fenced = [], section is None, False
  for line in text.splitlines():
    fenced ^= line.startswith("```")
    if line.startswith("#") and not fenced:
      level, _, title = line.partition(" ")
      if section == "top":
        wanted = level == "#"
      elif section is not None:
        wanted = _slug(title) == section
      if level == "#" or section is not None:
        continue
    if wanted:
      lines.append(line)
  if not any(lines):
    raise PluginError(f"{page.file.src_uri} includes {file}#{section}, which is not there")
  return LINK.sub(lambda match: f"]({_moved(match[1], page)})", "\n".join(lines).strip("\n"))


def _moved(target: str, page: Page) -> str:
  """A link in a file beside docs/, as seen from a page."""
  place = PAGES.get(target) or target.removeprefix("docs/")
  return posixpath.relpath(place, posixpath.dirname(page.file.src_uri))


def _slug(title: str) -> str:
  return re.sub(r"[^\w-]+", "", title.lower().replace(" ", "-"))


def _tables() -> Iterator[str]:
  """The paper's tables, as `lip-jax tables --markdown` prints them."""
  yield _printed(f"tables --markdown --runs={shlex.quote(str(ROOT / 'runs'))}")


def _notebooks() -> Iterator[str]:
  """For each notebook its title, what its first cell says, and the file."""
  paths = sorted((ROOT / "colab").glob("*.ipynb"))
  for path in paths:
    first = "".join(json.loads(path.read_text())["cells"][0]["source"])
    title = first.removeprefix("# ").partition("\n")[0]
    prose = [part for part in first.split("\n\n")[1:] if re.match(r"\w", part)]
    yield f"## {title}\n\n{''.join(prose[:1])}\n\n[{path.name}](colab/{path.name})"
  if not paths:
    yield "There are none yet."


def _every_command(name: str = "", level: int = 2) -> Iterator[str]:
  """A heading and the block that asks for help, for each subcommand and those below it."""
  _, _, listed = _printed(f"{name} --help").partition("\npositional arguments:\n")
  for inner in re.findall(r"^ {4}(\w+)", listed.partition("\n\n")[0], re.M):
    command = f"{name} {inner}".strip()
    yield f"{'#' * level} lip-jax {command}\n\n```console\n$ lip-jax {command} --help\n```"
    yield from _every_command(command, level + 1)


def _run(arguments: str) -> str:
  """A `lip-jax` command and what it prints, in a block."""
  return f"```console\n$ lip-jax {arguments}\n{_printed(arguments).rstrip()}\n```"


def _printed(arguments: str) -> str:
  """What a `lip-jax` command prints."""
  from lip_jax import cli

  printed = io.StringIO()
  columns = os.environ.get("COLUMNS")
  os.environ["COLUMNS"] = COLUMNS  # argparse breaks lines there
  try:
    with contextlib.redirect_stdout(printed):
      status = cli.main(shlex.split(arguments))
  except SystemExit as end:  # --help
    status = end.code
  finally:
    if columns is None:
      del os.environ["COLUMNS"]
    else:
      os.environ["COLUMNS"] = columns
  if status:
    raise PluginError(f"lip-jax {arguments} ends with status {status}")
  return printed.getvalue()
