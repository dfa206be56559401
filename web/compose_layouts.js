// Compose Layouts by hand: drag over the source for what to take, and drag this over the base.
import { BasePane } from "./base_pane.js"
import { CellsPane } from "./cells_pane.js"
import { registerEditor } from "./editor_widget.js"
import { decodeEditable, decodeGrid } from "./grids.js"
import { SheetPane } from "./sheet_pane.js"

/** The source, with the base, and with that of the two batches whose tiles are shown. */
function gridOf({ glm_grids: [pasted, onto] }) {
  const source = decodeEditable(pasted)
  const base = decodeGrid(onto)
  return { ...source, base, batch: base.count > source.count ? base : source }
}

registerEditor({
  type: "GLMImageComposeLayouts",
  runs: false,
  inputs: ["row", "column", "cells"],
  gridOf,
  panes: (texts) => [new SheetPane(), new CellsPane(texts.source), new BasePane(texts.base)],
  pick: (index) => ({ looked: index }),
  kept: (marks) => marks,
  about: ({ row, column, texts }) => [texts.at(row, column)],
  read({ row = null, column = null, looked }, grid) {
    return {
      taken: Math.min(looked, grid.batch.count - 1),
      row: row ?? grid.row,
      column: column ?? grid.column,
      shown: grid.given,
      by: grid.given.every(Boolean) ? "" : "mask",
      nothing: null,
      meant: grid.hashes.join(" "),
    }
  },
})
