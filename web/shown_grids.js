// Shows on a node the grids that it has written or read, once it has run. A setting of the page
// switches this off. Where a live preview still shows the same grid, that one stays instead.
import { app } from "../../scripts/app.js"
import { contextOf, decodeGrid, drawSheet, sheetOf } from "./grids.js"
import { onGrids, onRestored } from "./node_grids.js"
import { addElement } from "./node_widget.js"
import { keyOf, nodesOf, rootGraph } from "./page_nodes.js"

const NAME = "glm_grids"
const SETTING = "GLMImage.ShowGrids"
const TYPES = [
  "GLMImageSampleLayout",
  "GLMImageSampleTokens",
  "GLMImageEncodeTokens",
  "GLMImageLoadTokens",
]
const MOST = 260 // pixels: the tiles of a taller sheet are made smaller
const LEAST_WIDTH = 120
const MARGIN = 15 // between the node's edge and the widget
const GAP = 6 // between grids of different shapes

const shownOn = new WeakMap() // {grids, show} by node
let any = false // whether a node has got grids

/** Grids of one shape as a single one, whose tiles stand on one sheet. */
function joined(grids) {
  const shapes = new Map()
  for (const grid of grids.map(decodeGrid)) {
    const shape = `${grid.rows} ${grid.columns}`
    const first = shapes.get(shape) ?? { ...grid, tiles: [] }
    const tiles = [...first.tiles, ...grid.tiles]
    shapes.set(shape, { ...first, tiles, count: tiles.length })
  }
  return [...shapes.values()]
}

const sheet = ({ count, rows, columns }, width, most) => sheetOf(count, rows, columns, width, most)

/** The height that a node's grids take where there is room. */
function heightOf(node, grids) {
  const width = Math.max(LEAST_WIDTH, node.size[0] - 2 * MARGIN)
  const heights = grids.map((grid) => sheet(grid, width, MOST).height + GAP)
  return Math.ceil(heights.reduce((sum, height) => sum + height, 0))
}

function draw(canvas, grids) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight]
  if (!width || !height || !grids.length) return
  const context = contextOf(canvas, width, height)
  const most = height / grids.length - GAP
  for (const grid of grids) {
    const right = Math.max(...sheet(grid, width, most).boxes.map((box) => box.x + box.width))
    context.save()
    context.translate((width - right) / 2, 0)
    const used = drawSheet(context, grid, width, most)
    context.restore()
    context.translate(0, used + GAP)
  }
}

/** Adds the widget; returns a function that shows grids, or none. */
function addGrids(node) {
  let grids = []
  const element = document.createElement("div")
  element.className = "glm-image-grids"
  Object.assign(element.style, { position: "relative", width: "100%", overflow: "hidden" })
  const canvas = document.createElement("canvas")
  Object.assign(canvas.style, { position: "absolute", inset: "0", width: "100%", height: "100%" })
  element.append(canvas)
  new ResizeObserver(() => draw(canvas, grids)).observe(element)
  const fit = addElement(node, NAME, element, () => (grids.length ? heightOf(node, grids) : 0))
  return (shown) => {
    fit(() => (grids = shown))
    draw(canvas, grids)
  }
}

/** Whether the page still shows the last picture that came while the node ran. */
const hasLivePreview = (node) => Boolean(app.nodePreviewImages?.[keyOf(node)]?.length)

function update(node, wanted) {
  const { grids, show } = shownOn.get(node)
  show(wanted && !hasLivePreview(node) ? grids : [])
}

onGrids(TYPES, (node, output) => {
  shownOn.get(node).grids = joined(output.glm_grids)
  any = true
  update(node, app.extensionManager.setting.get(SETTING))
})

// Show Tokens has its picture from the page, which forgets it when it is reloaded.
onRestored("GLMImageShowTokens", (node, output) => {
  if (!output.images?.length || node.imgs?.length) return
  const nodeOutputs = { ...app.nodeOutputs, [keyOf(node)]: output }
  app.nodeOutputs = nodeOutputs
  // Pages of ComfyUI 0.3.75's time that draw nodes as elements have a second copy of them.
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker
  if (LiteGraph.vueNodesMode) tracker?.restore?.call({ nodeOutputs })
  node.setDirtyCanvas(true, true)
})

app.registerExtension({
  name: "GLMImage.ShownGrids",
  settings: [
    {
      id: SETTING,
      category: ["GLM-Image", "Nodes", "Show grids"],
      name: "Show tokens and layouts on the nodes",
      tooltip: "Sample, Encode and Load Tokens and Sample Layout show their grid after a run.",
      type: "boolean",
      defaultValue: true,
      onChange: (wanted) => {
        if (!any) return // the page may have no graph yet
        for (const node of nodesOf(rootGraph()))
          if (shownOn.has(node)) update(node, wanted)
      },
    },
  ],
  nodeCreated(node) {
    if (TYPES.includes(node.comfyClass)) shownOn.set(node, { grids: [], show: addGrids(node) })
  },
})
