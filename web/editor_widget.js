// Puts an editor of cells on a node, and reads and writes the node's ordinary inputs for it.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { CellEditor } from "./cell_editor.js"
import { editorTexts } from "./editor_texts.js"
import { wantedHeight } from "./editor_view.js"
import { decodeGrid } from "./grids.js"

const NAME = "glm_editor"
const EMPTY = 72 // pixels of height: without grids, with them, and of the bar and the readout
const LEAST = 220
const BARS = 76
const WIDTH = 380 // of a node that shows grids, at least

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name)

/** Whether an input's value comes through a link. */
export function isLinked(node, name) {
  const slot = node.inputs?.find((input) => input.name === name)
  return slot?.link != null
}

export const valueOf = (node, name) => widgetOf(node, name)?.value

export function setValue(node, name, value) {
  const widget = widgetOf(node, name)
  if (!widget || widget.value === value) return
  change(() => {
    widget.value = value
    widget.callback?.(value, app.canvas, node)
  })
  node.setDirtyCanvas(true, true)
}

/** Does what the page's undo shall know as one change. */
export function change(act) {
  app.canvas.emitBeforeChange?.()
  act()
  app.canvas.emitAfterChange?.()
}

/** Calls `changed()` after the value of one of these widgets was changed. */
function watch(node, names, changed) {
  for (const widget of names.map((name) => widgetOf(node, name)).filter(Boolean)) {
    const before = widget.callback
    widget.callback = function () {
      before?.apply(this, arguments)
      changed()
    }
  }
}

/** Runs what an output node needs, and nothing else of the graph. */
export function runOnly(node) {
  app.canvas.deselectAll()
  app.canvas.selectNode(node)
  app.extensionManager.command.execute("Comfy.QueueSelectedOutputNodes")
}

/**
 * Adds the editor as the node's last widget.
 * `inputs` is that of `CellEditor`; `watched` are the names of inputs that it reads.
 */
export function addEditor(node, inputs, watched) {
  const editor = new CellEditor(inputs, editorTexts())
  const widget = node.addDOMWidget(NAME, NAME, editor.element, {
    serialize: false, // not in the prompt
    hideOnZoom: false,
    getValue: () => "",
    setValue: () => {},
    getMinHeight: () => (editor.grid ? LEAST : EMPTY),
  })
  widget.serialize = false // nor in the workflow
  editor.element.style.minHeight = `${EMPTY}px` // pages that draw nodes as elements read this
  watch(node, watched, () => {
    if (editor.grid) inputs.typed(editor.grid)
    editor.redraw()
  })
  const [width, height] = node.computeSize()
  node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])])
  editor.redraw()
  return editor
}

/** Shows the grids of an output, and makes room for them on a node that has none. */
export function showGrids(node, editor, output) {
  const grid = decodeGrid(output.glm_grids[0])
  const urls = (output.glm_images ?? []).map((file) =>
    api.apiURL(`/view?${new URLSearchParams(file)}`)
  )
  const bare = node.computeSize()[1] - (editor.grid ? LEAST : EMPTY)
  const width = Math.max(WIDTH, node.size[0])
  const roomy = node.size[1] - bare >= LEAST
  editor.element.style.minHeight = `${LEAST}px`
  editor.show(grid, urls)
  if (!roomy) node.setSize([width, bare + wantedHeight(grid, width - 30) + BARS])
  node.setDirtyCanvas(true, true)
  setTimeout(() => takePlace(node, editor.element), 300) // after the page has shown the node
}

/** Vue nodes (1.58) go on showing the element of a node that the page's undo has replaced. */
function takePlace(node, element) {
  if (element.isConnected || node.graph !== app.canvas.graph) return
  document.querySelector(`[data-node-id="${node.id}"] .${element.className}`)?.replaceWith(element)
}
