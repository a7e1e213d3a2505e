#!/usr/bin/env python3
"""The solver cvc5 as a program, made of the package cvc5 of PyPI.

It reads SMT-LIB from its standard input, as the program cvc5 does with --lang smt, and prints the
answers. Cedar's analysis starts it: CVC5=scripts/cvc5-stdin.py cedar symcc ...
"""
import sys

import cvc5


def commands(lines):
    """Yield the texts of complete commands: their parentheses are closed."""
    text, depth, quoted = "", 0, ""
    for line in lines:
        for c in line:
            if quoted:
                quoted = "" if c == quoted else quoted
            elif c in '"|':
                quoted = c
            elif c == ";":
                break
            elif c in "()":
                depth += 1 if c == "(" else -1
        text += line
        if depth == 0 and not quoted:
            if text.strip():
                yield text
            text = ""


def start():
    """Return a new solver with the options of the command line, and the symbols that it knows."""
    terms = cvc5.TermManager()
    solver = cvc5.Solver(terms)
    for arg in sys.argv[1:]:
        name, _, value = arg.lstrip("-").partition("=")
        if value:
            solver.setOption(name, value)
    return solver, cvc5.SymbolManager(terms)


def main():
    solver, symbols = start()
    for text in commands(sys.stdin):
        if text.strip() == "(reset)":
            solver, symbols = start()
            continue
        parser = cvc5.InputParser(solver, symbols)
        parser.setStringInput(cvc5.InputLanguage.SMT_LIB_2_6, text, "stdin")
        while not (command := parser.nextCommand()).isNull():
            print(command.invoke(solver, symbols), end="", flush=True)


if __name__ == "__main__":
    main()
