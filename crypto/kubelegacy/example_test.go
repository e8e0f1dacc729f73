package kubelegacy_test

import (
	"bytes"
	"fmt"

	"golang.org/x/crypto/nacl/secretbox"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
)

// A value that kube-apiserver encrypted with a key of its own configuration.
func ExampleReader_Open() {
	secret := [32]byte(bytes.Repeat([]byte{7}, 32))
	var nonce [24]byte // in real life: random
	stored := append([]byte("k8s:enc:secretbox:v1:key1:"), nonce[:]...)
	stored = secretbox.Seal(stored, []byte("value"), &nonce, &secret)

	reader, err := kubelegacy.New(kubelegacy.Config{
		Type: kubelegacy.Secretbox, Keys: []kubelegacy.Key{{Name: "key1", Secret: secret[:]}}, Source: "encryption.yaml",
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	value, known, err := reader.Open([]byte("/registry/secrets/a/b"), stored)
	fmt.Printf("%s %v %v\n", value, known, err)
	// Output:
	// value true <nil>
}
