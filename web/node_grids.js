// Tells listeners which grids (`nodes/grid_ui.py`) a node has: after a run, with a tab that is
// shown again, and after the page was reloaded, from the server's history.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { nodeOf, nodesOf, rootGraph } from "./page_nodes.js"

const KEY = "glm_grids"
const RUNS = 16 // of the history that are looked through
const listeners = new Map() // by the node's type
const restorers = new Map() // by the node's type
const shown = new WeakSet() // nodes that have got grids

/** Calls `listener(node, output)` when nodes of these types get grids. */
export function onGrids(types, listener) {
  for (const type of types) listeners.set(type, [...(listeners.get(type) ?? []), listener])
}

/** Calls `listener(node, output)` when nodes of a type get an output back from the history. */
export function onRestored(type, listener) {
  restorers.set(type, listener)
}

function tell(node, output) {
  if (!output?.[KEY] || !listeners.has(node?.comfyClass)) return
  shown.add(node)
  for (const listener of listeners.get(node.comfyClass)) listener(node, output)
}

/** The outputs of the last run of the open workflow, or none. */
async function lastOutputs(graph) {
  const response = await api.fetchApi(`/history?max_items=${RUNS}`)
  if (!response.ok) return {}
  const runs = Object.values(await response.json()).sort((a, b) => b.prompt[0] - a.prompt[0])
  const ours = runs.filter((run) => run.prompt[3]?.extra_pnginfo?.workflow?.id === graph.id)
  return Object.assign({}, ...ours.reverse().map((run) => run.outputs))
}

async function restore() {
  const graph = rootGraph()
  const waits = ({ comfyClass }) => listeners.has(comfyClass) || restorers.has(comfyClass)
  if (!graph.id || ![...nodesOf(graph)].some(waits)) return
  const outputs = await lastOutputs(graph)
  if (graph !== rootGraph()) return
  for (const [id, output] of Object.entries(outputs)) {
    const node = nodeOf(id)
    if (node && !shown.has(node)) tell(node, output)
    restorers.get(node?.comfyClass)?.(node, output)
  }
}

app.registerExtension({
  name: "GLMImage.NodeGrids",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("GLMImage")) return
    const before = node.onExecuted
    node.onExecuted = function (output) {
      before?.apply(this, arguments)
      tell(this, output)
    }
  },
  afterConfigureGraph() {
    restore().catch((error) => console.warn("GLM-Image: no earlier pictures", error))
  },
  // Outputs that come back with a workflow's tab, or from the queue's history.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) tell(nodeOf(id), output)
  },
})
