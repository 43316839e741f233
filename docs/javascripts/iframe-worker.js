// Browsers start no worker from a file on a disk. There the search runs in a frame of the page, so
// that it works for offline readers as well.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inside = frame.contentWindow
      this.waiting = []
      this.inside.importScripts = (...urls) =>
        urls.reduce((before, each) => before.then(() => this.run(each)), Promise.resolve())
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.run(url).then(() => {
        this.loaded = true
        this.waiting.splice(0).forEach(data => this.postMessage(data))
      })
    }
    run(url) {
      return new Promise((resolve, reject) => {
        const script = this.inside.document.createElement("script")
        script.src = url
        script.onload = resolve
        script.onerror = reject
        this.inside.document.body.appendChild(script)
      })
    }
    postMessage(data) {
      if (!this.loaded) this.waiting.push(data)
      else this.inside.dispatchEvent(new MessageEvent("message", { data }))
    }
    set onmessage(listener) {
      this.addEventListener("message", listener)
    }
    terminate() {
      this.inside.frameElement.remove()
    }
  }
}
