"""How often each instruction of a kernel runs: basic blocks, loops, and what is known about its branches.

A branch is named by the source text that it was compiled from: the text of the innermost source line that has
a rule. A rule gives the share of warps that go into the statement's body, or a loop's trips. Which of the
branch's two ways leads into the body is found from the lines that lie only on it. A branch without a rule is
an error, so a kernel that changes is not counted by rules made for another.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sass

NEGLIGIBLE = 6  # instructions: a branch around fewer is counted as if it never skipped them


_DECIDES = re.compile(r"\b(if|for|while)\b|\?")


class UnknownBranch(Exception):
    """A branch that no rule explains, or whose ways cannot be told apart."""


@dataclass(frozen=True)
class Rule:
    text: str  # part of the source line, blanks aside
    share: float | None = None  # of warps that execute the statement's body
    trips: float | None = None  # of a loop, each time it is reached
    leaves: bool = False  # the body is return, continue or break: nothing of it is to be seen
    walk: bool = False  # the loop over tiles
    within: str = ""  # part of a line that the source line was inlined at
    few: bool = False  # so few trips that of the loops that the compiler made of it only the remainder's runs


@functools.cache
def _lines(path: str) -> list[str]:
    file = Path(path) if path.startswith("/") else sass.ROOT / path
    return file.read_text().splitlines() if file.exists() else []


def text_at(place: tuple[str, int]) -> str:
    path, line = place
    lines = _lines(path)
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


@functools.cache
def statement(place: tuple[str, int]) -> range:
    """The lines of the statement that begins here: with its body in braces, without its `else`."""
    path, first = place
    depth, lines = 0, _lines(path)
    for line in range(first, len(lines) + 1):
        text = lines[line - 1].split("//")[0].strip()
        if line == first and text.startswith("}"):
            text = text[1:]
        for character in text:
            depth += (character == "{") - (character == "}")
            if depth == 0 and character == "}" and line > first:
                return range(first, line)
        if depth == 0 and text.endswith((";", "}")):
            return range(first, line + 1)
    return range(first, first + 1)


@dataclass
class Block:
    first: int  # instructions [first, end)
    end: int
    successors: list[int]  # that follows, then that branched to


class Flow:
    """The basic blocks of a kernel's code."""

    def __init__(self, code: sass.Code):
        self.code = code
        self.blocks = self._split()
        self.dominators = self._dominate()
        self.loops = self._find_loops()  # header -> blocks

    def _target(self, i: int) -> int | None:
        instruction = self.code.instructions[i]
        # sm_80 leaves some loops by a call that never returns. What BRA.DIV leads to is for diverged warps.
        if instruction.op in ("BRA", "CALL") and not instruction.name.startswith("BRA.DIV"):
            return self.code.labels.get(instruction.target)
        return None

    def _split(self) -> list[Block]:
        instructions = self.code.instructions
        leaders = {0}
        for i, instruction in enumerate(instructions):
            target = self._target(i)
            if target is not None:
                leaders |= {target, i + 1}
            elif instruction.op in ("EXIT", "RET"):
                leaders.add(i + 1)
        starts = sorted(x for x in leaders if x < len(instructions))
        index = {first: i for i, first in enumerate(starts)}
        blocks = []
        for i, first in enumerate(starts):
            end = starts[i + 1] if i + 1 < len(starts) else len(instructions)
            last = instructions[end - 1]
            target = self._target(end - 1)
            falls = i + 1 < len(starts)
            if last.op in ("EXIT", "RET"):
                successors = [i + 1] if last.predicate and falls else []
            elif target is None:
                successors = [i + 1] if falls else []
            else:
                conditional = bool(last.predicate) or last.operands.count(",") > 0
                successors = ([i + 1] if conditional and falls else []) + [index[target]]
            blocks.append(Block(first, end, successors))
        # Out-of-line code, for warps that have diverged, is never reached from here.
        self.reached = {0}
        todo = [0]
        while todo:
            for successor in blocks[todo.pop()].successors:
                if successor not in self.reached:
                    self.reached.add(successor)
                    todo.append(successor)
        return blocks

    def _dominate(self) -> list[int]:
        """Per block, the set (as bits) of blocks that every way to it passes."""
        n = len(self.blocks)
        predecessors: list[list[int]] = [[] for _ in range(n)]
        for i in self.reached:
            for successor in self.blocks[i].successors:
                predecessors[successor].append(i)
        everything = (1 << n) - 1
        dominators = [everything] * n
        dominators[0] = 1
        changed = True
        while changed:
            changed = False
            for i in sorted(self.reached - {0}):
                common = everything
                for predecessor in predecessors[i]:
                    common &= dominators[predecessor]
                common |= 1 << i
                if common != dominators[i]:
                    dominators[i], changed = common, True
        self.predecessors = predecessors
        return dominators

    def _find_loops(self) -> dict[int, set[int]]:
        loops: dict[int, set[int]] = {}
        for i in self.reached:
            for header in self.blocks[i].successors:
                if not self.dominators[i] >> header & 1:
                    continue
                body = loops.setdefault(header, {header})
                todo = [i]
                while todo:
                    block = todo.pop()
                    if block not in body:
                        body.add(block)
                        todo += self.predecessors[block]
        return loops

    def is_back_edge(self, i: int, successor: int) -> bool:
        return successor in self.loops and bool(self.dominators[i] >> successor & 1)

    def _forward_reach(self, start: int, frm: int) -> set[int]:
        """What can run after the branch that ends `frm` went to `start`, in the same turn of all loops."""
        if self.is_back_edge(frm, start):
            return set()
        reach, todo = {start}, [start]
        while todo:
            block = todo.pop()
            for successor in self.blocks[block].successors:
                if successor not in reach and not self.is_back_edge(block, successor):
                    reach.add(successor)
                    todo.append(successor)
        return reach

    def _loop_exit(self, i: int) -> tuple[int, int, int] | None:
        """(header, way that stays, way that leaves) if the branch can leave a loop: the innermost such."""
        a, b = self.blocks[i].successors
        inside = [(len(body), header) for header, body in self.loops.items() if i in body]
        for _, header in sorted(inside):
            body = self.loops[header]
            if (a in body) != (b in body):
                return (header, a, b) if a in body else (header, b, a)
        return None

    def _rule_of(self, branch: sass.Instruction, rules: list[Rule]) -> tuple[Rule, int] | None:
        """Of the innermost line that decides anything; and how far outwards that is."""
        for depth, place in enumerate(branch.source):
            text = text_at(place)
            for rule in rules:
                if rule.text not in text:
                    continue
                if not rule.within or any(rule.within in text_at(p) for p in branch.source[depth + 1 :]):
                    return rule, depth
            if _DECIDES.search(text):
                break
        return None

    def _into_body(self, i: int, place: tuple[str, int], leaves: bool) -> int:
        """Which of the branch's successors executes the statement's body."""
        a, b = self.blocks[i].successors
        reach_a, reach_b = self._forward_reach(a, i), self._forward_reach(b, i)
        lines = statement(place)

        def weight(blocks: set[int]) -> int:
            return sum(
                any(where[0] == place[0] and where[1] in lines for where in instruction.source)
                for block in blocks
                for instruction in self.code.instructions[self.blocks[block].first : self.blocks[block].end]
            )

        def size(blocks: set[int]) -> int:
            return sum(self.blocks[block].end - self.blocks[block].first for block in blocks)

        if leaves:
            mine, theirs = -size(reach_a - reach_b), -size(reach_b - reach_a)
        else:
            mine, theirs = weight(reach_a - reach_b), weight(reach_b - reach_a)
            if mine == theirs:
                mine, theirs = size(reach_a - reach_b), size(reach_b - reach_a)
        if mine == theirs:
            where = self.code.instructions[self.blocks[i].end - 1].address
            raise UnknownBranch(f"which way of the branch at {where:#x} leads into: {text_at(place)}")
        return a if mine > theirs else b

    def _toward_remainder(self, i: int, rules: list[Rule]) -> int:
        """Which of the branch's successors is nearer to the shortest loop that is made of such few trips."""
        sizes = {}
        for header, body in self.loops.items():
            ends = [block for block in body if header in self.blocks[block].successors]
            found = self._rule_of(self.code.instructions[self.blocks[ends[0]].end - 1], rules)
            if found and found[0].few:
                sizes[header] = sum(self.blocks[block].end - self.blocks[block].first for block in body)
        goals = {header for header, size in sizes.items() if size < 2 * min(sizes.values())}

        def distance(start: int) -> float:
            seen, front, steps = {start}, {start}, 0
            while front:
                if front & goals:
                    return steps
                front = {
                    s for b in front for s in self.blocks[b].successors if not self.is_back_edge(b, s)
                } - seen
                seen |= front
                steps += 1
            return math.inf

        return min(self.blocks[i].successors, key=distance)

    def _is_slow_path(self, i: int) -> bool:
        """What divisions, roots and logarithms call for numbers that are not normal."""
        block = self.blocks[i]
        return any(
            instruction.op == "CALL" and instruction.operands.rstrip(")").endswith(("_slowpath", "_full"))
            for instruction in self.code.instructions[block.first : block.end]
        )

    def _chances(self, i: int, rules: list[Rule]) -> dict[int, float]:
        """Per successor, how many of the warps go there."""
        block = self.blocks[i]
        successors = block.successors
        if len(successors) == 1 or (len(successors) == 2 and successors[0] == successors[1]):
            return {successors[0]: 1.0}
        if not successors:
            return {}
        falls, taken = successors
        branch = self.code.instructions[block.end - 1]
        if self._is_slow_path(falls):
            return {taken: 1.0}
        if self._is_slow_path(taken):
            return {falls: 1.0}
        found = self._rule_of(branch, rules)
        if branch.op in ("EXIT", "RET"):
            return {falls: 1.0}
        skipped = self.blocks[taken].first - block.end
        around = 0 <= skipped < NEGLIGIBLE and taken in self.blocks[taken - 1].successors
        if around and not (found and found[0].trips is not None):
            return {falls: 1.0}
        if found is None:
            where = " < ".join(text_at(place) for place in branch.source[:4])
            raise UnknownBranch(f"no rule for the branch at {branch.address:#x}: {where}")
        rule, depth = found
        if rule.trips is not None:
            exits = self._loop_exit(i)
            if exits is not None:
                _, stays, leaves = exits
                again = 1 - 1 / max(rule.trips, 1)
                return {stays: again, leaves: 1 - again}
            inside = (
                self._toward_remainder(i, rules)
                if rule.few
                else self._into_body(i, branch.source[depth], False)
            )
            outside = taken if inside == falls else falls
            entered = min(rule.trips, 1.0)
            return {inside: entered, outside: 1 - entered}
        assert rule.share is not None
        body = self._into_body(i, branch.source[depth], rule.leaves)
        other = taken if body == falls else falls
        return {body: rule.share, other: 1 - rule.share}

    def frequencies(self, rules: list[Rule]) -> np.ndarray:
        """Per block, how often a warp runs it in the kernel's life."""
        n = len(self.blocks)
        matrix, entry = np.eye(n), np.zeros(n)
        entry[0] = 1
        unknown = {}
        for i in self.reached:
            try:
                chances = self._chances(i, rules)
            except UnknownBranch as reason:
                # It counts only where the other rules lead here at all.
                unknown[i], chances = reason, {self.blocks[i].successors[0]: 1.0}
            for successor, chance in chances.items():
                matrix[successor, i] -= chance
        frequencies = np.linalg.solve(matrix, entry)
        for i, reason in unknown.items():
            if frequencies[i] > 1e-9:
                raise reason
        return frequencies

    def walk(self, rules: list[Rule]) -> set[int]:
        """The blocks of the loop over tiles."""
        found = []
        for header, body in self.loops.items():
            for i in body:
                if header not in self.blocks[i].successors:
                    continue
                rule = self._rule_of(self.code.instructions[self.blocks[i].end - 1], rules)
                if rule and rule[0].walk:
                    found.append(body)
        if len(found) != 1:
            raise UnknownBranch(f"{len(found)} loops over tiles")
        return found[0]


@functools.cache
def flow_of(kernel: sass.Kernel) -> Flow:
    return Flow(kernel.code)
