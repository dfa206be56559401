// An element as a node's widget, stored neither in the prompt nor in the workflow.

/**
 * Adds the widget. `height()` is the least height in pixels; at 0 the element is hidden.
 * Returns `fit(change)`: makes a change, and gives the node the room that it needs then. Some pages
 * draw no widget of a node that comes later, so one that is shown later is there and hidden.
 */
export function addElement(node, name, element, height) {
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false, // not in the prompt
    hideOnZoom: false,
    getValue: () => "",
    setValue: () => {},
    getMinHeight: height,
    getMaxHeight: () => (height() ? undefined : 0),
  })
  widget.serialize = false // nor in the workflow
  const { display } = element.style
  const apply = () => {
    element.style.display = height() ? display : "none"
    element.style.minHeight = `${height()}px` // pages that draw nodes as elements read this
  }
  apply()
  return (change) => {
    const before = height()
    change()
    apply()
    const [width, least] = node.computeSize()
    const now = node.size[1] - (height() ? 0 : before)
    node.setSize([Math.max(width, node.size[0]), Math.max(least, now)])
    node.setDirtyCanvas(true, true)
  }
}
