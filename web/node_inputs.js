// A node's ordinary inputs, as the editor of cells reads and writes them. Beside them the node has
// one property: on which grid its cells were chosen.
import { app } from "../../scripts/app.js"

const CHOSEN_ON = "glm_cells_chosen_on"

/** Whether an input's value comes through a link. */
export function isLinked(node, name) {
  const slot = node.inputs?.find((input) => input.name === name)
  return slot?.link != null
}

/**
 * Where an input's value stands as {owner, widget}: on the node, or on a primitive that is linked
 * to it, which may give it to other nodes too. Nothing if a node computes it.
 */
function placeOf(node, name) {
  if (!isLinked(node, name))
    return { owner: node, widget: node.widgets?.find((widget) => widget.name === name) }
  const owner = node.getInputNode(node.findInputSlot(name))
  if (owner?.type?.startsWith("Primitive")) return { owner, widget: owner.widgets?.[0] }
}

/** Does what the page's undo shall know as one change. */
function change(act) {
  app.canvas.emitBeforeChange?.()
  act()
  app.canvas.emitAfterChange?.()
}

export class NodeInputs {
  /** `names` are those that the editor reads and writes. */
  constructor(node, names) {
    Object.assign(this, { node, names })
    this.looked = 0 // the index of a batch that is looked at, where no input says it
  }

  /** The values by their names, and `looked`; undefined are those that other nodes compute. */
  values() {
    return { looked: this.looked, ...this.valuesOf(this.names) }
  }

  valuesOf(names) {
    return Object.fromEntries(
      names.map((name) => [name, placeOf(this.node, name)?.widget?.value])
    )
  }

  /** Those of some changes that can be made: what another node computes stays. */
  free(changes) {
    return Object.fromEntries(
      Object.entries(changes).filter(([name]) => placeOf(this.node, name))
    )
  }

  /** Writes what has changed; returns whether that was an input. */
  write({ looked = this.looked, ...changes }) {
    this.looked = looked
    const before = this.valuesOf(Object.keys(changes))
    const changed = Object.entries(this.free(changes)).filter(
      ([name, value]) => before[name] !== value
    )
    if (!changed.length) return false
    change(() => {
      for (const [name, value] of changed) {
        const { owner, widget } = placeOf(this.node, name)
        widget.value = value
        widget.callback?.(value, app.canvas, owner)
      }
    })
    this.node.setDirtyCanvas(true, true)
    return true
  }

  /** Calls `changed()` after a value was changed on the node. */
  watch(changed) {
    for (const name of this.names) {
      const widget = this.node.widgets?.find((one) => one.name === name)
      if (!widget) continue
      const before = widget.callback
      widget.callback = function () {
        before?.apply(this, arguments)
        changed()
      }
    }
  }

  get cells() {
    return this.valuesOf(["cells"]).cells ?? ""
  }

  /** Whether the cells were chosen on another grid than that of a hash. */
  isStale(hash) {
    const chosenOn = this.node.properties[CHOSEN_ON]
    return Boolean(this.cells.trim() && chosenOn) && chosenOn !== hash
  }

  /** Notes that the cells are meant for the grid of a hash. */
  keep(hash) {
    const { properties } = this.node
    const chosenOn = this.cells.trim() ? hash : undefined
    if (properties[CHOSEN_ON] === chosenOn) return
    change(() => {
      if (chosenOn) properties[CHOSEN_ON] = chosenOn
      else delete properties[CHOSEN_ON]
    })
  }

  /** Cells that no page has seen with a grid are taken for this one. */
  adopt(hash) {
    if (this.cells.trim()) this.node.properties[CHOSEN_ON] ??= hash
  }
}
