package kubelegacy

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
)

func cbcOpener(block cipher.Block) opener {
	return func(etcdKey, payload []byte) ([]byte, bool) {
		// An IV and at least one block.
		if len(payload) < 2*aes.BlockSize || len(payload)%aes.BlockSize != 0 {
			return nil, false
		}
		out := make([]byte, len(payload)-aes.BlockSize)
		cipher.NewCBCDecrypter(block, payload[:aes.BlockSize]).CryptBlocks(out, payload[aes.BlockSize:])
		size, ok := unpad(out)
		// Both checks are made in any case, so that the time reveals little about which one failed.
		if o, isObject := parseObject(out[:size]); !isObject || !ok || !o.fits(etcdKey) {
			clear(out)
			return nil, false
		}
		return out[:size], true
	}
}

// unpad returns the length of the data before the padding, in constant time for a given length of
// out: at least one block. If the padding is invalid, it returns len(out) less one block.
// kube-apiserver also accepts padding of more than a block, which nothing writes.
func unpad(out []byte) (size int, ok bool) {
	n := int(out[len(out)-1])
	good := subtle.ConstantTimeLessOrEq(1, n) & subtle.ConstantTimeLessOrEq(n, aes.BlockSize)
	for i := 1; i <= aes.BlockSize; i++ {
		same := subtle.ConstantTimeByteEq(out[len(out)-i], out[len(out)-1])
		beyond := subtle.ConstantTimeLessOrEq(n+1, i)
		good &= same | beyond
	}
	return len(out) - subtle.ConstantTimeSelect(good, n, aes.BlockSize), good == 1
}
