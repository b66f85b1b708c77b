"""Completion of `bmjax` in a shell: a script that is made of the tables of commands, options and settings.

The script holds all words, so that a press of Tab starts no Python. What is neither a command, an option nor a key is
completed as a path.
"""

from collections.abc import Mapping

from bmjax.cli.parser import Command
from bmjax.config import Settings
from bmjax.errors import UserError

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# Completion of bmjax, by `bmjax completion bash`.
_bmjax() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    COMPREPLY=()
    if [[ "$word" == "=" || "${{COMP_WORDS[COMP_CWORD-1]}}" == "=" ]]; then
        return  # a value: readline completes it as a path
    fi
    if (( COMP_CWORD == 1 )); then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ ${{#COMPREPLY[@]}} -eq 1 && "${{COMPREPLY[0]}}" == *= ]]; then
        compopt -o nospace 2>/dev/null
    fi
}}
complete -o bashdefault -o default -F _bmjax bmjax
"""
# compinit defines compdef; -u: without a question about directories that others may write to.
_ZSH = """\
# Completion of bmjax, by `bmjax completion zsh`.
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit -u }}
_bmjax() {{
    local -a values
    if (( CURRENT == 2 )); then
        values=({commands})
        compadd -a values
        return
    fi
    case "$words[2]" in
{cases}
    esac
    compadd -S "" -- ${{(M)values:#*=}}
    compadd -- ${{values:#*=}}
    compset -P "*="  # a value is completed as a path
    _files
}}
compdef _bmjax bmjax
"""


def script(shell: str, commands: Mapping[str, Command]) -> str:
    """Return the script that a shell reads to complete `bmjax`. Raises UserError for another shell."""
    if shell not in SHELLS:
        raise UserError(f"bmjax completion: expected {', '.join(SHELLS)}, found '{shell}'")
    if shell == "fish":
        return _fish(commands)
    text, case = (_ZSH, "        {}) values=({}) ;;") if shell == "zsh" else (_BASH, '            {}) words="{}" ;;')
    cases = [case.format(name, " ".join(words_of(command))) for name, command in commands.items()]
    return text.format(commands=" ".join(["help", *commands]), cases="\n".join(cases))


def words_of(command: Command) -> list[str]:
    """Return what may follow a command: its options and its keys, `key=`."""
    options = [flag for row in command.all_options for flag in row.flags if flag.startswith("--")]
    keys = keys_of(command.settings_class()) if command.settings is not None else []
    return ["--help", *options, *(f"{key}=" for key in keys)]


def keys_of(settings: type[Settings]) -> list[str]:
    """Return the keys of settings, and those of the blocks in them as `block.key`."""
    keys = []
    for name, field in settings.model_fields.items():
        block = field.annotation
        if isinstance(block, type) and issubclass(block, Settings):
            keys += [f"{name}.{key}" for key in keys_of(block)]
        else:
            keys.append(name)
    return keys


def _fish(commands: Mapping[str, Command]) -> str:
    lines = ["# Completion of bmjax, by `bmjax completion fish`."]
    for name, command in commands.items():
        summary = command.summary.replace("'", "\\'")
        lines.append(f"complete -c bmjax -n __fish_use_subcommand -a {name} -d '{summary}'")
        for word in words_of(command):
            form = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            lines.append(f"complete -c bmjax -n '__fish_seen_subcommand_from {name}' {form}")
    return "\n".join([*lines, ""])
