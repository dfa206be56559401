// Lock Layout by hand: click a layout to take it, drag over it to lock cells.
// `batch_index` and `cells` are the truth. The hash of the layout that cells were chosen on is a
// property of the node, by which the page tells cells that were chosen for other layouts.
import { app } from "../../scripts/app.js"
import { lockedBy } from "./cells.js"
import { addEditor, change, isLinked, runOnly, setValue, showGrids, valueOf } from "./editor_widget.js"
import { onGrids } from "./node_grids.js"

const TYPE = "GLMImageLockLayout"
const CHOSEN_ON = "glm_cells_chosen_on"
const editors = new WeakMap()

function inputsOf(node) {
  const takenOf = (grid) =>
    isLinked(node, "batch_index") ? grid.taken : Number(valueOf(node, "batch_index"))
  const hashOf = (grid) => grid.hashes[takenOf(grid)] ?? grid.hashes.join(" ")
  const cells = () => valueOf(node, "cells") ?? ""
  const isStale = (grid) =>
    Boolean(cells().trim() && node.properties[CHOSEN_ON] !== hashOf(grid))
  const keep = (grid) => {
    if (cells().trim()) node.properties[CHOSEN_ON] = hashOf(grid)
    else delete node.properties[CHOSEN_ON]
  }
  let stale = false

  return {
    read(grid) {
      const fixed = isLinked(node, "cells")
      const lock = isLinked(node, "lock") ? null : valueOf(node, "lock")
      stale = !fixed && isStale(grid)
      return {
        taken: takenOf(grid),
        cells: fixed ? grid.lockedText : cells(),
        given: grid.given,
        shown: (lock && lockedBy(lock, grid.given, grid.rows, grid.columns)) ?? grid.locked,
        lock,
        stale,
        fixed,
      }
    },
    pick(index) {
      setValue(node, "batch_index", index)
    },
    write(text) {
      stale = false
      setValue(node, "cells", text)
    },
    keep: (grid) => change(() => keep(grid)),
    run: () => runOnly(node),
    /** After an input was changed by hand: cells that fitted go with the layout now taken. */
    typed(grid) {
      if (!stale) keep(grid)
    },
    /** Cells of a prompt that a page never saw are taken for these layouts. */
    adopt(grid) {
      if (cells().trim()) node.properties[CHOSEN_ON] ??= hashOf(grid)
    },
  }
}

onGrids([TYPE], (node, output) => {
  const { editor, inputs } = editors.get(node)
  inputs.adopt(output.glm_grids[0])
  showGrids(node, editor, output)
})

app.registerExtension({
  name: "GLMImage.LockLayout",
  nodeCreated(node) {
    if (node.comfyClass !== TYPE) return
    const inputs = inputsOf(node)
    const editor = addEditor(node, inputs, ["batch_index", "cells", "lock"])
    editors.set(node, { editor, inputs })
  },
})
