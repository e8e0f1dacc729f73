package envelope_test

import (
	"bytes"
	"fmt"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// A value is encrypted with a key of its own, which is derived from the DEK seed. What the KMS
// needs to unwrap the seed is stored in the value.
func Example() {
	// in real life: random, and wrapped by a KMS
	secret := bytes.Repeat([]byte{7}, envelope.SeedSize)
	header := envelope.Header{Type: envelope.TypeSeed, KeyID: "key-1/v1", Source: []byte("the wrapped seed")}

	seed, _ := envelope.NewSeed(envelope.TypeSeed, secret)
	frame, _ := envelope.NewFrame("main", header, seed)
	stored, _ := frame.Seal(nil, []byte("/registry/secrets/a/b"), []byte("value"))

	provider, object, _ := envelope.Split(stored)
	o, _ := envelope.Parse(object)
	fmt.Printf("%s: key ID %s, wrapped seed %q\n", provider, o.KeyID, o.Source)

	value, err := seed.Open(nil, []byte("/registry/secrets/a/b"), o.Data)
	fmt.Printf("%s %v\n", value, err)
	_, err = seed.Open(nil, []byte("/registry/secrets/another"), o.Data)
	fmt.Println(err)
	// Output:
	// main: key ID key-1/v1, wrapped seed "the wrapped seed"
	// value <nil>
	// data does not decrypt under this seed and etcd key
}
