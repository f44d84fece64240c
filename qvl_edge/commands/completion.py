"""Print the completion script of a shell: eval "$(qvl-edge completion bash)" in ~/.bashrc, or zsh in ~/.zshrc"""

import argparse

EXAMPLES = """examples:
  eval "$(qvl-edge completion bash)"                                            # in ~/.bashrc; zsh alike
  qvl-edge completion fish > ~/.config/fish/completions/qvl-edge.fish"""
BASH = """_qvl_edge() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"; else
    case "${{COMP_WORDS[1]}} $before" in
{values}
      *) case "$current" in -*) case "${{COMP_WORDS[1]}}" in
{options}
      esac;; esac;;
    esac
  fi
  if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$current"))
  else COMPREPLY=($(compgen -f -- "$current")); fi
}}
complete -o filenames -F _qvl_edge qvl-edge"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge completion`."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def execute(args: argparse.Namespace) -> int:
    """The script, from the parsers of the commands."""
    from qvl_edge.__main__ import COMMANDS, make_parser

    parsers = dict(zip(COMMANDS, make_parser().commands, strict=True))
    print(fish(parsers, COMMANDS) if args.shell == "fish" else ZSH * (args.shell == "zsh") + bash(parsers))
    return 0


def bash(parsers: dict[str, argparse.ArgumentParser]) -> str:
    """For bash, and for zsh with bashcompinit."""
    values, options = [], []
    for name, parser in parsers.items():
        options.append(f'        {name}) words="{" ".join(sorted(parser._option_string_actions))}";;')
        for option, action in parser._option_string_actions.items():
            if action.choices:
                values.append(f'      "{name} {option}") words="{" ".join(map(str, action.choices))}";;')
    return BASH.format(commands=" ".join(parsers), values="\n".join(values), options="\n".join(options))


def fish(parsers: dict[str, argparse.ArgumentParser], commands: dict[str, str]) -> str:
    """For fish."""
    lines = [f"complete -c qvl-edge -n __fish_use_subcommand -a {name} -d '{commands[name]}'" for name in parsers]
    for name, parser in parsers.items():
        for option, action in parser._option_string_actions.items():
            flag = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            choices = f" -xa '{' '.join(map(str, action.choices))}'" if action.choices else ""
            lines.append(f"complete -c qvl-edge -n '__fish_seen_subcommand_from {name}' {flag}{choices}")
    return "\n".join(lines)
