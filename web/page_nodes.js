// The nodes of the open workflow, those in its subgraphs too, and their ids in prompts and outputs.
import { app } from "../../scripts/app.js"

export const rootGraph = () => app.rootGraph ?? app.graph

/** A node by an id: `12`, `4:12` within node 4's subgraph, or `uuid:12` in one. */
export function nodeOf(id) {
  let graph = rootGraph()
  const path = String(id).split(":")
  const last = path.pop()
  for (const part of path)
    graph = graph?.subgraphs?.get(part) ?? graph?.getNodeById(Number(part))?.subgraph
  return graph?.getNodeById(Number(last))
}

/** The nodes of a graph and of the subgraphs in it. */
export function* nodesOf(graph) {
  for (const node of graph.nodes) {
    yield node
    if (node.subgraph) yield* nodesOf(node.subgraph)
  }
}

/** Under which the page keeps a node's outputs and its live previews. */
export function keyOf(node) {
  return node.graph === rootGraph() ? String(node.id) : `${node.graph.id}:${node.id}`
}
