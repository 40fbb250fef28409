// Go's http.FileServer, on one processor: serve_in_go FOLDER, on the listening socket 3.
package main

import (
	"net"
	"net/http"
	"os"
	"runtime"
)

func main() {
	runtime.GOMAXPROCS(1)
	listener, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		panic(err)
	}
	panic(http.Serve(listener, http.FileServer(http.Dir(os.Args[1]))))
}
