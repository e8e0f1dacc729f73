// Command etcd-kms-proxy is a transparent proxy in front of etcd that encrypts the values of chosen
// keys. See package cli for its commands.
package main

import (
	"os"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli"
)

// version is set by the linker: -ldflags "-X main.version=0.1.0".
var version string

func main() { os.Exit(cli.Main(version)) }
