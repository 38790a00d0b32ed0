// Browsers start no workers for pages that are opened from files. For such pages,
// this replaces `Worker` with an invisible frame, so that the search works.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.scope = frame.contentWindow
      this.scope.postMessage = data =>
        this.dispatchEvent(new MessageEvent("message", { data }))
      this.scope.importScripts = (...urls) =>
        urls.reduce((done, url) => done.then(() => this.load(url)), Promise.resolve())
      this.ready = this.load(url)
    }

    load(url) {
      const script = this.scope.document.createElement("script")
      script.src = url
      this.scope.document.body.append(script)
      return new Promise((resolve, reject) => {
        script.onload = resolve
        script.onerror = reject
      })
    }

    postMessage(data) {
      const event = new this.scope.MessageEvent("message", { data })
      this.ready.then(() => this.scope.dispatchEvent(event))
    }
  }
}
