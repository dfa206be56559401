// The tiles of a batch in the editor of cells: a click takes one.
import { batchOf, tileAt } from "./editor_places.js"
import { borderOf, drawBorder, drawFrame, drawLabel, drawTile } from "./grids.js"

export class SheetPane {
  pointer = "pointer"
  sheet = null // tiles with their numbers, drawn once and copied in every frame
  drawnOf = [] // what they were drawn of

  isAt({ places }, x, y) {
    return tileAt(places, x, y) >= 0
  }

  press({ places, pick }) {
    return (x, y) => {
      const tile = tileAt(places, x, y)
      return tile < 0 ? {} : pick(tile)
    }
  }

  key({ taken, grid, pick }, { key }) {
    const step = { PageUp: -1, PageDown: 1 }[key]
    const next = taken + step
    if (step && next >= 0 && next < batchOf(grid).count) return () => pick(next)
  }

  draw(context, { grid, pictures, places, taken, marks, stale, accent }) {
    const { boxes } = places
    if (!boxes.length) return
    const width = context.canvas.width
    const bottom = boxes.at(-1).y + boxes.at(-1).height
    const ratio = context.getTransform().a
    const tiles = batchOf(grid).tiles.map((tile, i) => pictures[i] ?? tile)
    this.render(tiles, boxes, width, ratio)
    context.drawImage(this.sheet, 0, 0, width / ratio, this.sheet.height / ratio)
    const border = borderOf(marks, grid.rows, grid.columns)
    boxes.forEach((box, i) => {
      if (taken >= 0 && taken !== i) return
      const isMarked = batchOf(grid) === grid
      if (isMarked) drawBorder(context, border, grid.columns, box, { width: 1, dashed: stale })
      drawFrame(context, box, accent)
    })
  }

  render(tiles, boxes, width, ratio) {
    const { x, y, height } = boxes.at(-1)
    const of = [...tiles, width, ratio, x, y, height]
    if (of.length === this.drawnOf.length && of.every((one, i) => one === this.drawnOf[i])) return
    this.drawnOf = of
    this.sheet = document.createElement("canvas")
    this.sheet.width = width
    this.sheet.height = Math.ceil((y + height) * ratio)
    const context = this.sheet.getContext("2d")
    context.scale(ratio, ratio)
    boxes.forEach((box, i) => {
      drawTile(context, tiles[i], box)
      drawLabel(context, i, box)
    })
  }
}
