package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
)

// The environment that makes this program a relay: a process of its own, so that its CPU time can
// be told from the clients'.
const (
	relayListen   = "BENCH_RELAY_LISTEN"
	relayUpstream = "BENCH_RELAY_UPSTREAM"
)

// relayIfAsked turns the process into the relay if it was started as one, and then does not return.
func relayIfAsked() {
	if os.Getenv(relayListen) == "" {
		return
	}
	fmt.Fprintf(os.Stderr, "error: %v\n", relay(os.Getenv(relayListen), os.Getenv(relayUpstream)))
	os.Exit(exitFailure)
}

// benchBurn is the environment variable that makes this program use CPU and do nothing else.
const benchBurn = "BENCH_BURN"

// burnIfAsked uses one CPU until it is killed, if the process was started for that.
func burnIfAsked() {
	if os.Getenv(benchBurn) == "" {
		return
	}
	for i := uint64(0); ; i++ {
		burned.Store(i)
	}
}

var burned atomic.Uint64

// relay is the least that a proxy in Go can do: it copies bytes between two TCP connections and
// knows no protocol. On Linux io.Copy between them is splice(2), so the bytes do not even enter the
// process.
func relay(listen, upstream string) error {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	for {
		down, err := l.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go join(down, upstream)
	}
}

func join(down net.Conn, upstream string) {
	defer down.Close()
	up, err := net.Dial("tcp", upstream)
	if err != nil {
		return
	}
	defer up.Close()
	var wg sync.WaitGroup
	for _, c := range [][2]net.Conn{{up, down}, {down, up}} {
		wg.Go(func() {
			_, _ = io.Copy(c[0], c[1]) // however it ends, the other side is told
			_ = c[0].(*net.TCPConn).CloseWrite()
		})
	}
	wg.Wait()
}
