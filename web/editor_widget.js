// Puts an editor of cells on nodes of a type, and shows it the grids of their runs.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { CellEditor } from "./cell_editor.js"
import { wantedHeight } from "./editor_places.js"
import { editorTexts } from "./editor_texts.js"
import { onGrids } from "./node_grids.js"
import { NodeInputs, isLinked } from "./node_inputs.js"
import { addElement } from "./node_widget.js"

const NAME = "glm_editor"
const EMPTY = 72 // pixels of height: without a grid, of the bar and the readout, of the pictures
const BARS = 76
const LEAST = 300
const WIDTH = 380 // of a node that shows grids, at least
const MARGINS = 30 // of the canvas in the node

/** Runs what an output node needs, and nothing else of the graph. */
function runOnly(node) {
  app.canvas.deselectAll()
  app.canvas.selectNode(node)
  app.extensionManager.command.execute("Comfy.QueueSelectedOutputNodes")
}

/**
 * Gives all nodes of a type an editor. A kind is what differs from node to node:
 *   type            the node's class
 *   runs            whether it can be run alone
 *   inputs          the names of the inputs that hands write, among them `cells`
 *   needs           an input without whose link there is no editor, if there is one
 *   gridOf(output)  the grid of a run whose cells are marked, or nothing
 *   panes(texts)    what stands on the canvas
 *   pick(index)     what changes if an index of the batch is taken
 *   kept(marks)     the cells that are bright, if some are marked
 *   about(state)    what the readout begins with
 *   read(values, grid)  {taken, shown, start, by, nothing, meant} and what its panes need besides:
 *                   the index taken, -1 for all; while `cells` is empty, the marks that count, those
 *                   with which marking begins, and the name of what sets them; the changes after
 *                   which no cell counts, null if no input can say that, as empty `cells` say
 *                   nothing; a hash of the grids for which cells are chosen
 */
export function registerEditor(kind) {
  const editors = new WeakMap() // {editor, fit} by node
  onGrids([kind.type], (node, output) => {
    const grid = kind.gridOf(output)
    if (grid) showGrid(node, editors.get(node), grid, output.glm_images)
  })
  app.registerExtension({
    name: `GLMImage.Editor.${kind.type}`,
    nodeCreated(node) {
      if (node.comfyClass === kind.type) editors.set(node, addEditor(node, kind))
    },
  })
}

/** The height of the pictures at the node's width. */
const wanted = (node, grid) => wantedHeight(grid, node.size[0] - MARGINS)

function addEditor(node, kind) {
  const inputs = new NodeInputs(node, kind.inputs)
  const editor = new CellEditor(kind, inputs, editorTexts(kind.type), () => runOnly(node))
  let needed = !kind.needs
  const height = () => {
    if (!needed) return 0
    return editor.grid ? BARS + Math.min(LEAST, wanted(node, editor.grid)) : EMPTY
  }
  const fit = addElement(node, NAME, editor.element, height)
  const before = node.onConnectionsChange
  node.onConnectionsChange = function () {
    before?.apply(this, arguments)
    const now = !kind.needs || isLinked(node, kind.needs)
    if (now !== needed) fit(() => (needed = now))
    editor.redraw()
  }
  inputs.watch(() => editor.changed())
  fit(() => editor.redraw())
  return { editor, fit }
}

/** Shows a grid; a node that has no room for it gets all that it wants. */
function showGrid(node, { editor, fit }, grid, images = []) {
  const urls = images.map((file) => api.apiURL(`/view?${new URLSearchParams(file)}`))
  const [width, height] = [Math.max(WIDTH, node.size[0]), node.size[1]]
  node.setSize([width, height])
  fit(() => editor.show(grid, urls))
  if (node.size[1] > height)
    node.setSize([width, node.size[1] + Math.max(0, wanted(node, grid) - LEAST)])
  setTimeout(() => takePlace(node, editor.element), 300) // after the page has shown the node
}

/** Vue nodes (1.58) go on showing the element of a node that the page's undo has replaced. */
function takePlace(node, element) {
  if (element.isConnected || node.graph !== app.canvas.graph) return
  document.querySelector(`[data-node-id="${node.id}"] .${element.className}`)?.replaceWith(element)
}
