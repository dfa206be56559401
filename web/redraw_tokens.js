// Sample Tokens by hand, where tokens are connected: drag over what shall be drawn anew.
import { countOf, inverted } from "./cells.js"
import { CellsPane } from "./cells_pane.js"
import { registerEditor } from "./editor_widget.js"
import { decodeEditable } from "./grids.js"
import { SheetPane } from "./sheet_pane.js"
import "./shown_grids.js" // what the node wrote stands above the editor: first come, first shown

registerEditor({
  type: "GLMImageSampleTokens",
  runs: false,
  inputs: ["cells"],
  needs: "tokens",
  gridOf: ({ glm_given: [tokens] = [] }) => tokens && decodeEditable(tokens),
  panes: () => [new SheetPane(), new CellsPane()],
  pick: (index) => ({ looked: index }),
  kept: inverted,
  about: ({ taken, grid, texts }) => (grid.total > 1 ? [texts.taken(taken, grid.total)] : []),
  read({ looked }, grid) {
    const masked = countOf(grid.given) > 0
    return {
      taken: Math.min(looked, grid.count - 1),
      shown: grid.given,
      start: grid.given,
      by: masked ? "mask" : "",
      nothing: masked ? null : { cells: "" },
      meant: grid.hashes.join(" "),
    }
  },
})
