// The search runs in a worker, and browsers start none for pages that are opened from the disk: a hidden frame does its work there.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.body.appendChild(Object.assign(document.createElement("iframe"), { hidden: true }))
      const inside = this.frame.contentWindow
      const load = (source) => new Promise((loaded) => {
        inside.document.body.append(Object.assign(inside.document.createElement("script"), { src: source, onload: loaded }))
      })
      inside.document.open()
      inside.document.write("<!doctype html><body></body>")
      inside.document.close()
      inside.importScripts = (...sources) => sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve())
      inside.postMessage = (data) => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      this.ready = load(new URL(url, location.href).href)
    }
    postMessage(data) {
      const copy = structuredClone(data)
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data: copy })))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
