// Shows the lines that a node of the pack says after a run, under its widgets, and what the decoder
// says of the node that samples it, which may be ComfyUI's own. ComfyUI's page shows the `text` of
// an output on a few of its nodes only, and takes away a running node's text when the prompt ends.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { addElement } from "./node_widget.js"
import { nodeOf } from "./page_nodes.js"

const NAME = "glm_message"
const LINE = 18 // pixels
const LETTER = 6.5 // pixels, on average
const MOST_LINES = 12 // more are scrolled
const BORDER = 10 + 4 // pixels: the page's margin around an element, and the padding in it

/** How many lines of so many letters a paragraph takes, broken between words. */
function lineCount(paragraph, letters) {
  let count = 1
  let used = 0
  for (const word of paragraph.split(" ")) {
    if (used && used + 1 + word.length > letters) {
      count += 1
      used = 0
    }
    used += word.length + (used ? 1 : 0)
    for (; used > letters; used -= letters) count += 1
  }
  return count
}

const messages = new WeakMap() // {element, fit} by node

function height(node, text) {
  const letters = Math.max(10, (node.size[0] - 40) / LETTER)
  const counts = text.split("\n").map((paragraph) => lineCount(paragraph, letters))
  return Math.min(MOST_LINES, counts.reduce((sum, count) => sum + count, 0)) * LINE + 2 * BORDER
}

function add(node) {
  const element = document.createElement("div")
  element.className = "glm-image-message"
  Object.assign(element.style, {
    boxSizing: "border-box",
    padding: "4px 8px",
    overflow: "auto",
    font: `12px/${LINE}px sans-serif`,
    whiteSpace: "pre-wrap",
    overflowWrap: "anywhere",
    color: "var(--input-text)",
    userSelect: "text",
  })
  const fit = addElement(node, NAME, element, () => height(node, element.textContent))
  return { element, fit }
}

function show(node, lines) {
  const text = lines.join("\n")
  const shown = node.widgets?.find((widget) => widget.name === NAME)
  if (!text) {
    if (shown) node.removeWidget(shown)
    return
  }
  if (!shown) messages.set(node, add(node))
  const { element, fit } = messages.get(node)
  fit(() => (element.textContent = text))
}

app.registerExtension({
  name: "GLMImage.NodeMessages",
  setup() {
    api.addEventListener("glm_image.notice", ({ detail }) => {
      const node = nodeOf(detail.node)
      if (node) show(node, detail.text.split("\n"))
    })
    api.addEventListener("executing", ({ detail }) => {
      const node = detail && nodeOf(detail)
      if (node) show(node, [])
    })
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("GLMImage")) return
    const before = node.onExecuted
    node.onExecuted = function (output) {
      before?.apply(this, arguments)
      if (output?.text) show(this, output.text)
    }
  },
  // Outputs that come back with a workflow's tab, or from the queue's history.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = nodeOf(id)
      if (output?.text && node?.comfyClass?.startsWith("GLMImage")) show(node, output.text)
    }
  },
})
