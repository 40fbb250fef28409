// A relay as it is written in Go: io.Copy in both directions, which splices.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
)

func forward(dst, src *net.TCPConn, done chan<- bool) {
	io.Copy(dst, src)
	dst.CloseWrite()
	done <- true
}

func relay(a *net.TCPConn, backend string) {
	defer a.Close()
	connection, err := net.Dial("tcp", backend)
	if err != nil {
		return
	}
	b := connection.(*net.TCPConn)
	defer b.Close()
	done := make(chan bool, 2)
	go forward(b, a, done)
	go forward(a, b, done)
	<-done
	<-done
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	for {
		connection, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		go relay(connection.(*net.TCPConn), os.Args[1])
	}
}
