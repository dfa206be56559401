// Lock Layout by hand: click a layout to take it, drag over it to lock cells.
import { lockedBy } from "./cells.js"
import { CellsPane } from "./cells_pane.js"
import { registerEditor } from "./editor_widget.js"
import { decodeEditable } from "./grids.js"
import { SheetPane } from "./sheet_pane.js"

registerEditor({
  type: "GLMImageLockLayout",
  runs: true,
  inputs: ["batch_index", "cells", "lock"],
  gridOf: ({ glm_grids: [layouts] }) => decodeEditable(layouts),
  panes: () => [new SheetPane(), new CellsPane()],
  pick: (index) => ({ batch_index: index }),
  kept: (marks) => marks,
  about: ({ taken, grid, texts }) =>
    taken < 0 ? [texts.all(grid.total)] : [texts.taken(taken, grid.total)],
  read({ batch_index, lock }, grid) {
    const taken = Number(batch_index ?? grid.taken)
    return {
      taken,
      shown: (lock && lockedBy(lock, grid.given, grid.rows, grid.columns)) ?? grid.marked,
      start: lock === "none" ? null : grid.given,
      by: lock,
      nothing: lock === undefined ? null : { cells: "", lock: "none" },
      meant: grid.hashes[taken] ?? grid.hashes.join(" "),
    }
  },
})
