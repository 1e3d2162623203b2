"""What the machine code does not say about the kernels of csrc/cuda: which way their branches go, how often
their loops turn. One rule per source line that decides; sass_flow.py tells how they are applied.

Where a kernel changes, its new branches need rules here; the model refuses to count it until then.
"""

from __future__ import annotations

import math

from sass_flow import Rule


def rules_for(shape, case, tiles: float) -> list[Rule]:
    """`tiles`: how many a block walks."""
    logits = shape.logits
    threads = 32 * logits.warps
    steps = shape.steps(case.columns)
    vector = 16 // case.element_bytes
    second = 0 if shape.kernel == "forward" or shape.resident else logits.n // shape.step
    positives = case.share_with_positives(shape)
    one_exponential = case.beta in (0, 1)
    band, rows = max(shape.band, 1), max(math.sqrt(tiles), 1)
    always, never = 1.0, 0.0
    return [
        # The walk.
        Rule("while (at.is_within(all)) {", trips=tiles, walk=True),
        Rule("for (Place at(all); at.is_within(all); at.next(all)) {", trips=tiles, walk=True),
        # In a band of tiles the walk goes row by row; a block has about as many rows of tiles as columns.
        Rule("if (!ends_row(all)) {", share=1 - 1 / band),
        Rule("if (++row == all.rows_end(band)) {", share=1 / rows),
        Rule("if (at.begins_row(all)) {", share=1 / band),
        Rule("if (at.row == all.row_begin) store_col_labels(", share=1 / rows),
        Rule("if (t < kM) labels.store_row(", share=logits.m / threads),
        Rule("if (place % 32 == 0) {", share=always),
        Rule("if (at.ends_row(all)) {", share=1 / band),
        Rule("if (t >= kM) return;", share=1 - logits.m / threads, leaves=True),
        Rule("if (p.symmetric && at.ends_band(all)) {", share=1 / rows),
        Rule("for (int t = thread(); t < columns", trips=band * logits.n / threads),
        Rule("for (int i = int(threadIdx.x); i < kNumbers;", trips=10),  # before the walk: not counted
        # One fused pass: what is left out, what is positive, then the negatives.
        Rule("if (alike || some_left_out) {", share=positives),
        Rule("if (some_left_out)", share=never),
        Rule("for (int bit = 0; bit < 32 &&", trips=32),
        Rule("if ((flags & LabelsOfWalk::kWide) != 0) add_unlike", share=never),
        Rule("if (ptx::any_sync(any)) {", share=case.columns_with_positives(shape)),
        Rule("if (ptx::any_sync(maybe(i, line))) {", share=case.rows_with_positives(shape)),
        Rule("if (f.group == 0) ptx::shared_store", share=always),
        Rule("if (kRowLines < 8 && line >= kRowLines) return;", share=never, leaves=True),
        Rule("if (by_column) ", share=always),
        Rule("for (int tile = begin; tile < end; ++tile) {", trips=tiles, walk=True),
        Rule("for (int step = 0; step < steps; ++step) {", trips=steps),
        Rule("for (int step = 1; step < steps; ++step)", trips=steps - 1),
        Rule("for (int step = 0; step < kN / Traits::kStep; ++step) {", trips=second),
        Rule("for (int stage = 0; stage < kStages - 1; ++stage)", trips=shape.stages - 1),
        # Loads ahead stop stages - 1 steps before the walk's end: nearly always there is one.
        Rule("if (steps.left()) steps.load(memory_ + place);", share=always),
        Rule("if (ahead_step < steps) {", share=steps / (steps + second)),
        # A tile's rows are those of the tile before until the walk comes to another row.
        Rule("if (threadIdx.x / kLoaders == turn) {", share=1 / 2),
        Rule("if (tile.row != row_that_stays)", share=1 / band if steps == shape.stages else always),
        Rule("if (col >= int(p.anchors.stride)) {", share=1 / steps),
        Rule("if (col == Traits::Ring::kPlaces", share=always),
        Rule("if (++ahead_step == steps + kN / Traits::kStep) {", share=1 / (steps + second)),
        Rule("return x < limit ? int(x) : limit;", share=always),
        # Once per tile.
        Rule("if (step == 0) store_label(label);", share=1 / steps),
        # One branch of the machine code decides this and what load_other asks: a thread for each row.
        Rule("if (step == 0) load_other(tile);", share=logits.n / threads / steps),
        Rule("if (t < kN) store_row(", share=always, within="if (step == 0) load_other(tile);"),
        Rule("if (steps == 1) ptx::sync_threads();", share=float(steps == 1)),
        # Self-contrast from bench/: every row has a label, none is ignored, labels are small numbers.
        Rule("if (p.symmetric) {", share=always),
        Rule("for (; rest >= p.groups - first; ++first)", trips=10),  # before the walk: not counted
        Rule("return has_label()", share=min(1.0, (logits.m + logits.n) / threads)),
        Rule("if (has_label()) labels.store(", share=min(1.0, (logits.m + logits.n) / threads)),
        Rule("if (row >= side.rows) return side.none;", share=never, leaves=True),
        Rule("if (side.views != 1)", share=never),
        Rule("return side.labels ? ptx::global_load", share=always),
        Rule("if (labels.any_wide()) {", share=never),
        # Tiles on the diagonal are one of hundreds.
        Rule("if (masked) {", share=never),
        Rule("return labels.is_valid(row) && labels.is_valid(F::kM + col)", share=always),
        Rule("for (int ni = 0; ni < F::kNI; ++ni) {", trips=logits.pieces_n),
        # Resident rows: the next tile's numbers, then chunks of columns, in each of which a warp votes.
        Rule("if (tile + 1 < end) load_other(tile + 1);", share=min(1.0, logits.n / threads)),
        Rule("if (t >= kN) return;", share=never, leaves=True),
        Rule("if (t == 0) ptx::shared_store(", share=1 / threads),
        Rule("if (t < kM) own.store(", share=min(1.0, logits.m / threads)),
        Rule("for (int first = 0; first < kN; first += Traits::kChunk) {", trips=logits.n / shape.chunk),
        Rule("if (!ptx::any_sync(any_alike(other, first)))", share=1 - positives),
        # One of a lane's 16 pairs, hardly ever more.
        Rule("if (kPositives && ptx::any_sync(", share=1 / 16),
        Rule("if (alike()) {", share=always),
        Rule("if (masked) mask(", share=never),
        # The vote of a warp.
        Rule("if (positives) {", share=positives),
        Rule("if (positives) write_shifted(", share=positives),
        # Off the diagonal a tile counts for its columns too.
        Rule("if (with_columns) ", share=always),
        Rule("if (with_columns) {", share=always),
        Rule("if (beta == 0 || beta == 1) {", share=float(one_exponential)),
        Rule("} else if (beta == 0 || beta == 1) {", share=float(one_exponential)),
        Rule("if (beta == 0) return;", share=float(case.beta == 0), leaves=True),
        # A thread for each row, then for each column.
        Rule("if (t < kM) {", share=logits.m / threads),
        Rule("} else if (t < Traits::kPlaces && with_columns) {",
             share=logits.n / max(threads - logits.m, logits.n)),
        Rule("if (t < kM) store_row(", share=logits.m / threads),
        Rule("if (t < kN) store_row(", share=logits.n / threads),
        Rule("if (row >= p.anchors.count) return;", share=never, leaves=True),
        # The first tile of a row or column finds its slot empty; a group is some tiles wide.
        Rule("if (!first) {", share=always),
        Rule("if (!side.statistics || row >= side.rows.count) return r;", share=never, leaves=True),
        Rule("return d == 0 ? T(0) : d * std::exp(-lse - low);", share=always),
        # Products without tensor cores.
        Rule("for (int k = 0; k < A::kCols; k += kVector) {", trips=shape.depth / vector),
        Rule("for (int k = 0; k < X::kRows; ++k) {", trips=shape.step),
        # Logits that are not bounded; the temperature comes from the host nevertheless.
        Rule("return scale.temperature ?", share=never),
        Rule("if (!scale.decides) return otherwise;", share=always, leaves=True),
        Rule("if (logits_are_unbounded(params.scale,", share=never, leaves=True),
        Rule("if (!positive && !negative) return 0;", share=never, leaves=True),
        # A warp's 32 pairs hardly ever hold a positive one.
        Rule("if (positive) return c(kCPos)", share=never, leaves=True),
        Rule("return d == 0 ? T(0) : d * exp2_of", share=always),
        Rule("if (from.n_pos > 0) {", share=positives),
        Rule("if (from.n_neg > 0) {", share=always),
        Rule("if (into.n_pos > 0) {", share=positives),
        Rule("if (into.n_neg > 0) {", share=always),
        # Before the walk, float16.
        Rule("p.unit ? ptx::global_load(p.unit)", share=float(case.batch > 4096)),
        Rule("alike ? T(0) : largest_gradient(other", share=never),
        Rule("const T upstream = side.upstream ?", share=never),
        Rule("if (!(bound > 0 && bound < T(1e30))) return 1;", share=never, leaves=True),
        Rule("if (!side.derivatives) return top;", share=never, leaves=True),
        Rule("for (int64_t row = first; row < n; row += step) {", trips=case.batch / threads),
        # After the walk.
        Rule("if (upstream) factor *=", share=always),
        Rule("if (num_terms) {", share=always),
        Rule("factor /= terms > 1 ? terms : T(1);", share=never),
        Rule("if (row >= rows) continue;", share=never, leaves=True),
        Rule("if (col >= stride) continue;", share=never, leaves=True),
    ]  # fmt: skip
